"""How far off at most: an interval for every neuron's score, and what is lowest, both proven.

With a frozen norm, neuron u changes the logits by delta, and with Y = delta - E_p[delta]::

    score = u . g - gap        g    gradient of log p(target) at the base
    gap   = log E_p[exp Y]     p    the base's prediction

(The gap has nothing to do with the target. Of several accepted answers, with shares s of their
probability, ``log sum_w s_w exp(u . g_w)`` is in the place of ``u . g``.)

``u . g`` costs one dot product; the gap, never negative, is bounded in three stages, each only for
the neurons whose interval the stage before left wider than the tolerance.

1. *Range.* Y has mean 0 and lies in [-a, b], known from the projection index. exp lies below its
   chord, so exp(gap) <= (b exp(-a) + a exp(b)) / (a + b).
2. *Likely tokens.* Over the likeliest tokens S the moments of Y are computed, and give their share
   of E_p[exp Y] up to the rest of a Taylor series, y^5 / 120 exp(y). Of the other tokens the index
   knows the sums of squares and fourth powers: with mean c and sums of (delta - c)^2 and
   (delta - c)^4 over them, E2 and E4, the sum of p (delta - c)^2 is at most
   min(max p * E2, sqrt(sum p^2 * E4)) (Cauchy-Schwarz). Since (exp(y) - 1 - y) / y^2 increases
   with y, its value at b times the sum of p Y^2 bounds what they add; Jensen at their mean bounds
   it from below.
3. *Exact.* The score itself.

Moments of a subvalue serve all neurons that write it: an attention neuron's source positions cost
nothing more.

Rounding. Every interval is widened by what may round, in the model of ``topk``: the slack of the
tangent, ``8 sqrt(d_model) eps |u| reach + 32 eps``, and by what one logit of delta may be off, e.
Errors of the other logits, by e and in the base's by h (what rounds at its size before centring),
count as far as the neuron moves the prediction: by at most
``min(1, sqrt(gap / 2)) * (exp(2 (e + h)) - 1) + e^2 / 2``, for the total variation between the
predictions is at most sqrt(gap / 2) (Pinsker's inequality). The index holds float32 numbers with
an allowance of their own, ``Projections.rounding``, by which ranges and moments are widened: that
part does not shrink where scores are computed in float64, the rest does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.baselines import Baseline
from tl_neuron_attr.decompose import AttnDecomposition, Decomposition, rows_at, slopes
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.index import ProjectionIndex, rounding_unit
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import Target, at_least_one
from tl_neuron_attr.readout import ReadOut
from tl_neuron_attr.scores import Progress
from tl_neuron_attr.topk import (
    AnswerSlopes,
    Bounds,
    Kind,
    RankedNeurons,
    TangentBound,
    best_by_bound,
    bounds_of_one_run,
    exact_scores,
    no_intervals,
    tangent_bounds,
    top_neurons,
)

DEFAULT_TOLERANCE = 1e-3
"""Nats by which an interval may be wide before the neuron is looked at more closely."""

# Stage 2 looks at one token in so many (a row of it costs that part of an exact score), and at no
# fewer than so many.
_ONE_IN, _FEWEST = 24, 256

# Where logits may change by more nats than that, the exponentials of stage 2 would leave the range
# of float32, and its series says nothing: such neurons go from stage 1 to stage 3.
_STEEP = 30.0

_NEURONS = 2**15  # a block of them whose numbers stay in cache

_SUM_ROUNDING = 64  # eps by which a sum of thousands of positive terms may be off

_EXCLUDES_NOTHING = 1e30  # a finite bound that no score reaches


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Both ends of every neuron's score, in nats: of all neurons of one kind, of one run.

    A neuron that is off scores exactly 0. Every interval is at most ``tolerance`` wide, unless the
    score was computed exactly (then rounding is all that is left) or that was not asked for.
    """

    kind: Kind
    layers: tuple[int, ...]
    """The layer of each row."""
    lower: Float[Tensor, "layer neuron"]
    """Neurons are numbered as in their layer's decomposition."""
    upper: Float[Tensor, "layer neuron"]
    exact: Bool[Tensor, "layer neuron"]
    """Whether the score was computed; of the others it was bounded."""
    tolerance: float
    refined: int
    """Neurons whose interval took a look at the likeliest tokens (stage 2)."""
    evaluated: int
    """Neurons whose score was computed (stage 3)."""

    __repr__ = brief

    @property
    def width(self) -> Float[Tensor, "layer neuron"]:
        """Upper less lower end."""
        return self.upper - self.lower

    def total(self) -> tuple[float, float]:
        """Between what the sum of all scores lies."""
        return float(self.lower.sum(dtype=torch.float64)), float(
            self.upper.sum(dtype=torch.float64)
        )

    def positive_total(self) -> tuple[float, float]:
        """Between what the sum of the positive scores lies."""
        return float(self.lower.clamp(min=0).sum(dtype=torch.float64)), float(
            self.upper.clamp(min=0).sum(dtype=torch.float64)
        )

    def share(self, top: int) -> tuple[float, float]:
        """Between what lies the share of the positive scores' sum that the ``top`` best hold.

        Both the sum of the best and that of the others rise with every score, so the ends of the
        intervals give the ends of both. (0, 0) if no score is positive.
        """
        top = at_least_one(top, "top")
        best_low, rest_low = _best_and_rest(self.lower, top)
        best_high, rest_high = _best_and_rest(self.upper, top)
        if best_high == 0:
            return 0.0, 0.0
        lowest = best_low / (best_low + rest_high) if best_low > 0 else 0.0
        return lowest, best_high / (best_high + rest_low)


@full_precision()
def score_intervals(
    blocks: Sequence[Decomposition],
    out: ReadOut,
    target: Target,
    index: ProjectionIndex | None,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    before: Baseline | None = None,
    evaluate: bool = True,
    likely: int | None = None,
    progress: Progress | None = None,
) -> Intervals:
    """An interval around the score of every neuron of these blocks (all of one kind, of one run).

    Args:
        blocks: The neurons, one decomposition a layer.
        out: The read-out of the run, its norm frozen.
        target: What is explained. Scores of a contrast are linear: known at once, up to rounding.
        index: The projection index of this very model (``index.check_index`` tells); ``None`` will
            do for a contrast.
        tolerance: Nats. Wider intervals are narrowed; infinite, none is.
        before: The blocks' baselines, where they are at hand: one base a block.
        evaluate: Whether what is still wider after stage 2 is scored exactly.
        likely: How many tokens stage 2 looks at (0: none); by default one in 24, at least 256.
        progress: Called with the number of neurons scored exactly since the last call.

    Cost: a dot product a subvalue; a 24th of a read-out for each subvalue whose neurons are wide
    then; a read-out for each neuron that is wide still. Memory: two numbers a neuron, and
    ``out.budget``.

    Raises:
        InputError: If the norm is recomputed, or the index is not of a model of this shape.
    """
    if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise InputError(f"the tolerance must be a number of nats, 0 or more; got {tolerance!r}")
    if not out.affine:
        raise InputError(no_intervals(out))
    before = _baseline(blocks, out, target) if before is None else before
    if before.aims.against is not None:
        return _linear(blocks, out, before, tolerance)
    n_neurons = blocks[0].n_neurons
    spreads = _spreads(blocks, out, before, index)
    lower = torch.zeros(len(blocks), n_neurons, dtype=out.dtype, device=blocks[0].base.device)
    upper = torch.zeros_like(lower)
    exact = torch.zeros_like(lower, dtype=torch.bool)
    refined = 0
    for place, spread in enumerate(spreads):
        ends = _first_stage(spread, out)
        lower[place], upper[place], exact[place] = ends.lower, ends.upper, ends.off
        wide = _wider(lower[place], upper[place], tolerance).nonzero()[:, 0]
        if likely != 0 and len(wide) > 0:
            ends = _second_stage(spread, out, before, wide, likely)
            lower[place, wide], upper[place, wide] = ends.lower, ends.upper
            refined += len(wide)
    wide = _wider(lower, upper, tolerance)
    evaluated = int(wide.sum()) if evaluate else 0
    if evaluated:
        scores = []
        for some in wide.flatten().nonzero()[:, 0].split(8 * out.rows_per_block):
            scores.append(exact_scores(blocks, out, before, some))
            if progress is not None:
                progress(len(some))
        per_block = torch.cat(scores).split(wide.sum(1).tolist())
        for place, (spread, score) in enumerate(zip(spreads, per_block, strict=True)):
            slack = _rounding_of(spread, wide[place].nonzero()[:, 0], score)
            lower[place, wide[place]] = score - slack
            upper[place, wide[place]] = score + slack
        exact |= wide
    return Intervals(
        kind=_kind(blocks),
        layers=tuple(block.layer for block in blocks),
        lower=lower,
        upper=upper,
        exact=exact,
        tolerance=tolerance,
        refined=refined,
        evaluated=evaluated,
    )


@full_precision()
def suppressing_neurons(
    blocks: Sequence[Decomposition],
    out: ReadOut,
    target: Target,
    index: ProjectionIndex | None,
    top: int,
    *,
    before: Baseline | None = None,
    likely: int | None = None,
    progress: Progress | None = None,
) -> RankedNeurons:
    """The ``top`` neurons that lower log p(target) most, lowest score first, with a certificate.

    Exactly those a dense evaluation of every neuron would list last: their intervals' lower ends
    bound scores from below. Where no bound holds (a recomputed norm, a soft cap) every neuron is
    scored; the scores of a contrast are linear. ``index`` may be ``None`` in both cases.

    Cost: as ``score_intervals``, stage 2 for the neurons that could be among them; then about one
    read-out per neuron listed.

    Raises:
        InputError: If the index is not of a model of this shape, or missing.
    """
    if out.affine and target.against is not None:
        found = top_neurons(blocks, out, _reversed(target), top)
        kth_score = 0.0 - found.certificate.kth_score
        certificate = replace(found.certificate, kth_score=kth_score, lowest=True)
        return replace(found, score=0.0 - found.score, certificate=certificate)
    before = _baseline(blocks, out, target) if before is None else before
    total = sum(block.n_neurons for block in blocks)
    if not out.affine or 2 * top >= total:
        bounds = [_no_bounds(block, out) for block in blocks]
    else:
        bounds = _lower_bounds(blocks, out, before, index, top, likely)
    found = best_by_bound([blocks], bounds, out, before, top, lowest=True, progress=progress)[0]
    if out.affine:
        return found
    return replace(found, certificate=replace(found.certificate, applies=False))


# --- without scoring --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Both ends of some neurons' scores."""

    lower: Float[Tensor, " neuron"]
    upper: Float[Tensor, " neuron"]
    slack: Float[Tensor, " neuron"]
    """What of that is for rounding, at either end."""
    off: Bool[Tensor, " neuron"]
    """Neurons whose coefficient is 0: they score exactly 0."""


@dataclass(frozen=True, kw_only=True)
class BlockEnds:
    """What is known of one block's scores before any is computed."""

    spread: "_Spread"
    out: ReadOut
    before: Baseline
    likely: int | None

    def all(self) -> Ends:
        """Of every neuron, at the cost of a few operations each."""
        return _first_stage(self.spread, self.out)

    def of(self, numbers: Int[Tensor, " neuron"]) -> Ends:
        """Of these neurons, as close as can be: with an index after a look at likely tokens."""
        if isinstance(self.spread, _IndexedSpread) and self.likely != 0 and len(numbers) > 0:
            return _second_stage(self.spread, self.out, self.before, numbers, self.likely)
        return _ends_of(self.spread, self.out, numbers)


@full_precision()
def ends_of_blocks(
    blocks: Sequence[Decomposition],
    out: ReadOut,
    before: Baseline,
    index: ProjectionIndex | None = None,
    *,
    likely: int | None = None,
) -> list[BlockEnds]:
    """Intervals around the scores of these blocks (all of one kind, of one run), by block.

    Without an index they rest on subvalues' norms: by the Cauchy-Schwarz inequality a contribution
    u moves no logit farther from its expectation than |u| times the distance of the farthest
    token's direction, nor, in the mean square, than |u| times their mean square distance. Those of
    a contrast are as narrow as rounding.

    Raises:
        InputError: If the norm is recomputed, or the index is not of a model of this shape.
    """
    if not out.affine:
        raise InputError(no_intervals(out))
    if before.aims.against is not None or index is None:
        spreads: Sequence[_Spread] = _spreads_of_norms(blocks, out, before)
    else:
        spreads = _spreads(blocks, out, before, index)
    return [BlockEnds(spread=each, out=out, before=before, likely=likely) for each in spreads]


# --- per unit of coefficient ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """What is known of one block's subvalues before a single exponential is taken.

    Per unit of coefficient, in logits over the scale of the norm.
    """

    block: Decomposition
    base: int
    """The block's place in the baseline."""
    slope: Float[Tensor, " subvalue"]
    slack: Float[Tensor, " subvalue"]
    """By how much the slope, or the expected change of a logit, may be off."""
    below: Float[Tensor, " subvalue"]
    """By how much any logit may change less than expected under p."""
    above: Float[Tensor, " subvalue"]
    """By how much any logit may change more."""
    mean_square: Float[Tensor, " subvalue"] | None = None
    """Expected square of a change less the expected one: never below the true one, if known."""
    rounding: Float[Tensor, " subvalue"]
    """By how much any change may be off in the dtype of scores."""
    base_rounding: float
    """By how much any log-probability of the base may be off."""
    constant: float
    """Allowance for the rounding of a logsumexp, and of accepted answers' shares."""
    answers: AnswerSlopes | None
    """Of several accepted answers."""

    def rise(
        self, coefficient: Float[Tensor, " neuron"], subvalue: Int[Tensor, " neuron"]
    ) -> Float[Tensor, " neuron"]:
        """What the first-order picture says of neurons of these subvalues."""
        if self.answers is None:
            return coefficient * self.slope[subvalue]
        return self.answers.rise(coefficient, self.answers.slopes[:, subvalue])


@dataclass(frozen=True, kw_only=True)
class _IndexedSpread(_Spread):
    """With what the projection index knows besides, for stage 2."""

    expected_direction: Float[Tensor, " d_model"]
    """Its dot product with a subvalue is what p expects the subvalue to add to a logit."""
    expected: Float[Tensor, " subvalue"]
    """Expected change of a logit under p."""
    mean: Float[Tensor, " subvalue"]
    """Change of a logit, all tokens alike: any number near it would do."""
    spread: Float[Tensor, " subvalue"]
    """Root mean square of changes less the mean: never below the true one."""
    spread4: Float[Tensor, " subvalue"]
    """Fourth root of the mean fourth power: never below the true one."""


def _spreads(
    blocks: Sequence[Decomposition],
    out: ReadOut,
    before: Baseline,
    index: ProjectionIndex | None,
) -> list[_IndexedSpread]:
    index = _checked(blocks, out, index)
    projections = index.ffn if _kind(blocks) == "ffn" else index.attn
    tangents = tangent_bounds([blocks], out, before)
    # the read-out is affine, and the target one token
    assert tangents is not None and before.tangent is not None and before.norm_scale is not None
    # by how much coarser the index's arithmetic may be than that of scores
    coarser = torch.finfo(torch.float32).eps / torch.finfo(out.dtype).eps
    base_rounding = _base_rounding(out, before, index.widest)
    spreads = []
    for base, (block, tangent) in enumerate(zip(blocks, tangents[0], strict=True)):
        scale = before.norm_scale[base]
        expected_direction = before.tangent.expected[base]
        expected = slopes(block.rows(), block.outlet(expected_direction)[None])[0]

        def stored(
            name: str, block: Decomposition = block, scale: Tensor = scale
        ) -> Float[Tensor, " subvalue"]:
            values = getattr(projections, name)[block.layer]
            values = values.to(device=scale.device, dtype=out.dtype) / scale
            return block.outlet.of_norms(values)

        rounding = stored("rounding")
        off = rounding + tangent.slack
        inflate = 1 + _SUM_ROUNDING * torch.finfo(torch.float32).eps
        spreads.append(
            _IndexedSpread(
                block=block,
                base=base,
                expected_direction=expected_direction,
                slope=tangent.slope,
                slack=tangent.slack,
                expected=expected,
                below=(expected - stored("low") + off).clamp(min=0),
                above=(stored("high") - expected + off).clamp(min=0),
                mean=stored("mean"),
                spread=inflate * stored("spread") + rounding,
                spread4=inflate * stored("spread4") + rounding,
                rounding=rounding / coarser,
                base_rounding=base_rounding[base],
                constant=_constant(tangent, base_rounding[base]),
                answers=tangent.answers,
            )
        )
    return spreads


def _spreads_of_norms(
    blocks: Sequence[Decomposition], out: ReadOut, before: Baseline
) -> list[_Spread]:
    """The same without an index: from subvalues' norms alone; of a contrast, without a gap."""
    tangents = tangent_bounds([blocks], out, before)
    assert tangents is not None and before.norm_scale is not None  # the read-out is affine
    contrast = before.aims.against is not None
    apart = None if contrast else out.deviations(before)
    inflate = 1 + _SUM_ROUNDING * torch.finfo(out.dtype).eps
    unit = rounding_unit(out.W_U.shape[0], out.dtype) * _largest_gain(out)
    base_rounding = [0.0] * len(blocks)
    if apart is not None:
        base_rounding = _base_rounding(out, before, apart.widest)
    spreads = []
    for base, (block, tangent) in enumerate(zip(blocks, tangents[0], strict=True)):
        norms = inflate * block.norms().to(out.dtype)
        reach = rounding = torch.zeros_like(norms)
        mean_square = None
        if apart is not None:
            rounding = unit * apart.widest * norms / before.norm_scale[base]
            reach = apart.largest[base] * norms + rounding + tangent.slack
            mean_square = apart.mean_square[base] * norms.square()
        spreads.append(
            _Spread(
                block=block,
                base=base,
                slope=tangent.slope,
                slack=tangent.slack,
                below=reach,
                above=reach,
                mean_square=mean_square,
                rounding=rounding,
                base_rounding=base_rounding[base],
                constant=_constant(tangent, base_rounding[base]),
                answers=tangent.answers,
            )
        )
    return spreads


def _constant(tangent: TangentBound, base_rounding: float) -> float:
    """What rounds whatever the neuron: a logsumexp; and the shares of several accepted answers."""
    return tangent.constant + (0.0 if tangent.answers is None else 2 * base_rounding)


def _largest_gain(out: ReadOut) -> float:
    return 1.0 if out.gain is None else float(out.gain.abs().max())


def _base_rounding(out: ReadOut, before: Baseline, widest: float) -> list[float]:
    """By how much a log-probability of each base may be off."""
    largest_bias = 0.0 if out.b_U is None else float(out.b_U.abs().max())
    sizes = torch.linalg.vector_norm(out.normalize(before.resid), dim=-1)
    if out.centered:  # the mean that is taken away may be far larger than what it leaves
        assert before.norm_scale is not None  # the read-out is affine
        mean = before.resid.to(out.dtype).mean(-1) / before.norm_scale
        sizes = sizes.hypot(_largest_gain(out) * math.sqrt(out.W_U.shape[0]) * mean)
    unit = rounding_unit(out.W_U.shape[0], out.dtype)
    return (unit * (sizes * widest + largest_bias)).tolist()


@dataclass(frozen=True, kw_only=True)
class _Likely:
    """What stage 2 found out about some subvalues.

    Y is the change of a logit less its expectation, in units of ``size``, so that fourth powers
    neither overflow nor vanish; sums are over tokens, weighted by p.
    """

    subvalue: Int[Tensor, " subvalue"]
    """Which they are, in order."""
    size: Float[Tensor, " subvalue"]
    """Largest possible change per unit of coefficient."""
    second: Float[Tensor, " subvalue"]
    """Sum of Y^2 over the likeliest tokens."""
    third: Float[Tensor, " subvalue"]
    fourth: Float[Tensor, " subvalue"]
    rest_first: Float[Tensor, " subvalue"]
    """Sum of Y over the other tokens."""
    rest_second: Float[Tensor, " subvalue"]
    """At least the sum of Y^2 over the other tokens."""
    rest_mass: Float[Tensor, ""]
    """Probability of the other tokens."""


def _likely(
    spread: _IndexedSpread,
    out: ReadOut,
    before: Baseline,
    subvalue: Int[Tensor, " subvalue"],
    likely: int | None,
) -> _Likely:
    """Stage 2 for these subvalues. Cost: a product of their rows with ``likely`` directions."""
    assert before.log_probs is not None and before.norm_scale is not None
    d_model, d_vocab = out.W_U.shape
    n_tokens = _how_many(out, likely)
    eps = torch.finfo(out.dtype).eps
    log_probs = before.log_probs[before.prediction[spread.base]]
    likeliest = log_probs.topk(n_tokens)
    rest = log_probs.exp()
    rest[likeliest.indices] = 0.0
    rest_mass = rest.sum()
    directions = out.directions(likeliest.indices, before.norm_scale[spread.base])
    directions = spread.block.outlet(directions - spread.expected_direction).T
    # beside the sums weighted by p the plain ones, to take from those of the whole vocabulary
    weights = torch.stack([likeliest.values.exp(), torch.ones_like(likeliest.values)], dim=1)
    rows = spread.block.rows()
    per_row = out.dtype.itemsize * (4 * n_tokens + 2 * d_model)
    n_rows = max(1, min(512, out.budget // per_row))
    below, above = spread.below[subvalue], spread.above[subvalue]
    size = torch.maximum(below, above).clamp(min=torch.finfo(out.dtype).tiny)
    below, above = below / size, above / size
    sums = []
    for some, unit in zip(subvalue.split(n_rows), size.split(n_rows), strict=True):
        Y = (rows_at(rows, some).to(out.dtype) / unit[:, None]) @ directions
        first = Y @ weights
        squares = Y.square()
        second = squares @ weights
        third = Y.mul_(squares) @ weights
        fourth = squares.square_() @ weights
        sums.append(torch.stack([first, second, third, fourth]))
    weighted, plain = torch.cat(sums, dim=1).unbind(-1)
    # from here on, delta - mean = Y - shift
    shift = (spread.mean[subvalue] - spread.expected[subvalue]) / size
    slack = spread.slack[subvalue] / size
    off = spread.rounding[subvalue] / size + slack
    inflate = 1 + _SUM_ROUNDING * eps
    energy2 = inflate * d_vocab * (spread.spread[subvalue] / size).square()
    energy2 = energy2 - _at_least(_powers(plain, shift, n_tokens, 2), n_tokens, 2, off, eps)
    energy4 = inflate * d_vocab * (spread.spread4[subvalue] / size).pow(4)
    energy4 = energy4 - _at_least(_powers(plain, shift, n_tokens, 4), n_tokens, 4, off, eps)
    energy = torch.minimum(
        rest.max() * energy2.clamp(min=0),
        rest.square().sum().sqrt() * energy4.clamp(min=0).sqrt(),
    )
    rest_first = -weighted[0]  # all tokens together make 0
    # from the mean of all tokens to the expectation under p, and what rounds in it
    moved = inflate * energy + 2 * shift * rest_first - shift.square() * rest_mass
    moved = moved + 2 * slack * (2 * shift.abs() + rest_first.abs() + 2 * slack)
    # (above - Y) (Y + below) is nowhere negative
    inside = rest_mass * below * above + (above - below) * rest_first
    inside = inside + (above - below).abs() * slack
    return _Likely(
        subvalue=subvalue,
        size=size,
        second=weighted[1],
        third=weighted[2],
        fourth=weighted[3],
        rest_first=rest_first,
        rest_second=inflate * torch.minimum(moved, inside).clamp(min=0),
        rest_mass=rest_mass,
    )


def _powers(
    sums: Float[Tensor, "4 subvalue"], shift: Float[Tensor, " subvalue"], n: int, power: int
) -> tuple[Float[Tensor, " subvalue"], Float[Tensor, " subvalue"]]:
    """Sum of (Y - shift)^power over n tokens, and the size of what cancels in computing it."""
    first, second, third, fourth = sums
    if power == 2:
        total = second - 2 * shift * first + n * shift.square()
        return total, (second.sqrt() + shift.abs() * n**0.5).square()
    total = fourth - 4 * shift * third + 6 * shift.square() * second
    total = total - 4 * shift.pow(3) * first + n * shift.pow(4)
    return total, (fourth.pow(0.25) + shift.abs() * n**0.25).pow(4)


def _at_least(
    powers: tuple[Float[Tensor, " subvalue"], Float[Tensor, " subvalue"]],
    n: int,
    power: int,
    off: Float[Tensor, " subvalue"],
    eps: float,
) -> Float[Tensor, " subvalue"]:
    """What the sum of powers is not below, where each of n terms' bases may be ``off`` by so much.

    By Minkowski's inequality: the norm is off by at most that of the errors.
    """
    total, cancelled = powers
    norm = (total - _SUM_ROUNDING * eps * cancelled).clamp(min=0).pow(1 / power)
    return (norm - n ** (1 / power) * off).clamp(min=0).pow(power)


def _how_many(out: ReadOut, likely: int | None) -> int:
    d_model, d_vocab = out.W_U.shape
    if likely is None:
        likely = max(_FEWEST, d_vocab // _ONE_IN)
    # their directions, twice while they are made, and one row's powers
    affordable = out.budget // (out.dtype.itemsize * (2 * d_model + 8))
    return max(1, min(likely, d_vocab, affordable))


# --- per neuron -------------------------------------------------------------------------------


def _first_stage(spread: _Spread, out: ReadOut) -> Ends:
    """From the range alone (and the mean square, if known), of all neurons of a block."""
    return _ends_of(spread, out, torch.arange(spread.block.n_neurons, device=spread.slope.device))


def _ends_of(spread: _Spread, out: ReadOut, numbers: Int[Tensor, " neuron"]) -> Ends:
    parts = []
    for some in _chunks(numbers, out):
        coefficient, subvalue, below, above = _reach(spread, some)
        gap = _range_gap(below, above)
        if spread.mean_square is not None:
            square = coefficient.square() * spread.mean_square[subvalue]
            moment = (square * _curve(above.clamp(max=_STEEP))).log1p()
            gap = torch.minimum(gap, moment.where(above < _STEEP, torch.inf))
        parts.append(_ends(spread, coefficient, subvalue, torch.zeros_like(gap), gap))
    return _joined(parts)


def _second_stage(
    spread: _IndexedSpread,
    out: ReadOut,
    before: Baseline,
    numbers: Int[Tensor, " neuron"],
    likely: int | None,
) -> Ends:
    """With a look at the likeliest tokens, of these neurons."""
    found = _likely(spread, out, before, _subvalue_of(spread.block, numbers).unique(), likely)
    parts = []
    for some in _chunks(numbers, out):
        coefficient, subvalue, below, above = _reach(spread, some)
        place = torch.searchsorted(found.subvalue, subvalue)
        slack = coefficient.abs() * spread.slack[subvalue]
        least, most = _likely_gaps(found, place, coefficient, below, above, slack)
        most = torch.minimum(most, _range_gap(below, above))
        parts.append(_ends(spread, coefficient, subvalue, torch.minimum(least, most), most))
    return _joined(parts)


def _joined(parts: Sequence[Ends]) -> Ends:
    columns = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("lower", "upper", "slack", "off")
    }
    return Ends(**columns)


def _wider(lower: Tensor, upper: Tensor, tolerance: float) -> Tensor:
    """Where an interval is wider than that; also where it is no number."""
    return ~(upper - lower <= tolerance)


def _reach(
    spread: _Spread, numbers: Int[Tensor, " neuron"]
) -> tuple[
    Float[Tensor, " neuron"],
    Int[Tensor, " neuron"],
    Float[Tensor, " neuron"],
    Float[Tensor, " neuron"],
]:
    """Coefficient, subvalue, and how far logits may change below and above their expectation."""
    coefficient = spread.block.coefficients_of(numbers)
    subvalue = _subvalue_of(spread.block, numbers)
    below, above = spread.below[subvalue], spread.above[subvalue]
    negative, size = coefficient < 0, coefficient.abs()
    return (
        coefficient,
        subvalue,
        size * above.where(negative, below),
        size * below.where(negative, above),
    )


def _range_gap(
    below: Float[Tensor, " neuron"], above: Float[Tensor, " neuron"]
) -> Float[Tensor, " neuron"]:
    """At least log E[exp Y], of any Y with mean 0 that is between -below and above."""
    eps, tiny = torch.finfo(below.dtype).eps, torch.finfo(below.dtype).tiny
    both = (below + above).clamp(min=tiny)
    curved = below * _curve(-below) + above * _curve(above)
    gap = (below * (above / both) * curved).log1p()
    steep = above + ((below + above * (-both).exp()) / both).log() + 8 * eps * both
    return gap.where(above < _STEEP, steep).clamp(min=0)


def _likely_gaps(
    likely: _Likely,
    place: Int[Tensor, " neuron"],
    coefficient: Float[Tensor, " neuron"],
    below: Float[Tensor, " neuron"],
    above: Float[Tensor, " neuron"],
    slack: Float[Tensor, " neuron"],
) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
    """At most and at least log E[exp Y], of neurons whose subvalues are those at ``place``."""
    eps = torch.finfo(coefficient.dtype).eps
    scaled = coefficient * likely.size[place]
    steep = scaled.abs() >= _STEEP
    scaled, above = scaled.clamp(-_STEEP, _STEEP), above.clamp(max=_STEEP)
    square = scaled.square()
    second = square * likely.second[place]
    third = scaled * square * likely.third[place]
    fourth = square.square() * likely.fourth[place]
    series = second / 2 + third / 6 + fourth / 24
    rounded = _SUM_ROUNDING * eps * (second + (second * fourth).sqrt() + fourth)
    # the rest of the series, y^5 / 120 exp(some y), is nowhere below -y^4 / 24
    least = series - rounded - below.clamp(max=5) * fourth / 120
    most = series + rounded + above * above.exp() * fourth / 120
    # the other tokens: their mean is as near 0 as rounding allows, and inside the range
    first = scaled * likely.rest_first[place]
    mass = likely.rest_mass.clamp(min=torch.finfo(coefficient.dtype).tiny)
    mean = first.sign() * (first.abs() - slack).clamp(min=0) / mass
    mean = torch.maximum(torch.minimum(mean, above), -below)
    inflate = 1 + _SUM_ROUNDING * eps
    rest_least = likely.rest_mass * mean.square() * _curve(mean) / inflate
    rest_most = inflate * square * likely.rest_second[place] * _curve(above)
    least = (least.clamp(min=0) + rest_least).log1p()
    most = (most + rest_most).clamp(min=0).log1p()
    return least.where(~steep, 0.0), most.where(~steep, torch.inf)


def _curve(y: Float[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
    """(exp(y) - 1 - y) / y^2, which increases with y and is 1/2 at 0."""
    # near 0 by its series, as far as the dtype can tell
    terms = 7 if y.dtype == torch.float32 else 14
    series = torch.full_like(y, 1 / math.factorial(terms + 1))
    for power in range(terms, 1, -1):
        series.mul_(y).add_(1 / math.factorial(power))
    return series.where(y.abs() < 0.25, (y.expm1() - y) / y.square())


def _ends(
    spread: _Spread,
    coefficient: Float[Tensor, " neuron"],
    subvalue: Int[Tensor, " neuron"],
    least_gap: Float[Tensor, " neuron"],
    most_gap: Float[Tensor, " neuron"],
) -> Ends:
    tangent = spread.rise(coefficient, subvalue)
    off = coefficient == 0
    slack = _slack(spread, coefficient, subvalue, most_gap).where(~off, 0.0)
    return Ends(
        lower=(tangent - most_gap - slack).where(~off, 0.0),
        upper=(tangent - least_gap + slack).where(~off, 0.0),
        slack=slack,
        off=off,
    )


def _rounding_of(
    spread: _Spread, numbers: Int[Tensor, " neuron"], score: Float[Tensor, " neuron"]
) -> Float[Tensor, " neuron"]:
    """By how much the exact scores of these neurons may be off."""
    coefficient = spread.block.coefficients_of(numbers)
    subvalue = _subvalue_of(spread.block, numbers)
    gap = spread.rise(coefficient, subvalue) - score
    gap = gap + coefficient.abs() * spread.slack[subvalue] + spread.constant
    return _slack(spread, coefficient, subvalue, gap.clamp(min=0))


def _slack(
    spread: _Spread,
    coefficient: Float[Tensor, " neuron"],
    subvalue: Int[Tensor, " neuron"],
    gap: Float[Tensor, " neuron"],
) -> Float[Tensor, " neuron"]:
    """What may round in a score or its bounds, of neurons whose gap is at most ``gap``."""
    size = coefficient.abs()
    change = size * spread.rounding[subvalue]
    any_logit = spread.base_rounding + change
    variation = (gap / 2).sqrt().clamp(max=1)
    moved = variation * (2 * any_logit).clamp(max=_STEEP).expm1() + change.square() / 2
    moved = torch.minimum(moved, 2 * any_logit)
    relative = _SUM_ROUNDING * torch.finfo(gap.dtype).eps * gap
    return size * spread.slack[subvalue] + spread.constant + change + moved + relative


def _subvalue_of(block: Decomposition, number: Int[Tensor, " neuron"]) -> Int[Tensor, " neuron"]:
    """Which subvalue each of these neurons writes, in the order of ``block.rows``."""
    if isinstance(block, AttnDecomposition):
        head, _, index = block.place(number)
        return head * block.shape[2] + index
    return number


def _chunks(numbers: Int[Tensor, " neuron"], out: ReadOut) -> tuple[Tensor, ...]:
    """As many neurons at a time as fit into the budget, with some forty numbers each."""
    return numbers.split(max(1, min(_NEURONS, out.budget // (40 * out.dtype.itemsize))))


# --- lowest scores ----------------------------------------------------------------------------


def _lower_bounds(
    blocks: Sequence[Decomposition],
    out: ReadOut,
    before: Baseline,
    index: ProjectionIndex | None,
    top: int,
    likely: int | None,
) -> list[Bounds]:
    """Bounds of the scores' negatives: of stage 2 for neurons that may be listed, else of stage 1.

    No score above the ``top``-th lowest upper end can be listed, nor can a neuron whose lower end
    is above it.
    """
    spreads = _spreads(blocks, out, before, index)
    uppers = torch.zeros(0, dtype=out.dtype, device=blocks[0].base.device)
    for spread in spreads:
        uppers = torch.cat([uppers, _first_stage(spread, out).upper])
        uppers = uppers.topk(min(top, len(uppers)), largest=False).values
    bounds = []
    for spread in spreads:
        ends = _first_stage(spread, out)
        near = ((ends.lower <= uppers[-1]) & ~ends.off).nonzero()[:, 0]
        better = ends.lower[near]
        if len(near) > 0 and likely != 0:
            better = torch.maximum(better, _second_stage(spread, out, before, near, likely).lower)
        bounds.append(_bounds(spread, out, near, better))
    return bounds


def _bounds(
    spread: _Spread, out: ReadOut, near: Int[Tensor, " near"], better: Float[Tensor, " near"]
) -> Bounds:
    """Bounds of one block's negated scores: of stage 1, but for the neurons more is known of."""

    def negated() -> tuple[Float[Tensor, " neuron"], Float[Tensor, ""]]:
        ends = _first_stage(spread, out)
        lower = ends.lower.index_copy(0, near, better)
        return (-lower).where(~ends.off, -torch.inf), ends.slack.max()

    return bounds_of_one_run(negated)


def _no_bounds(block: Decomposition, out: ReadOut) -> Bounds:
    """Bounds that leave every neuron of a block to be scored."""

    def bounds() -> tuple[Float[Tensor, " neuron"], Float[Tensor, ""]]:
        coefficients = block.all_coefficients()
        nothing = torch.full_like(coefficients, _EXCLUDES_NOTHING, dtype=out.dtype)
        return nothing.where(coefficients != 0, -torch.inf), nothing.new_zeros(())

    return bounds_of_one_run(bounds)


# --- what is asked ----------------------------------------------------------------------------


def _linear(
    blocks: Sequence[Decomposition], out: ReadOut, before: Baseline, tolerance: float
) -> Intervals:
    """Of a contrast: the first-order picture is the whole picture."""
    tangents = tangent_bounds([blocks], out, before)
    assert tangents is not None  # the read-out is affine
    scores = torch.stack([tangent.linear() for tangent in tangents[0]])
    slack = torch.stack(
        [
            tangent.block.all_coefficients().abs() * tangent.block.of_each(tangent.slack)
            for tangent in tangents[0]
        ]
    )
    return Intervals(
        kind=_kind(blocks),
        layers=tuple(block.layer for block in blocks),
        lower=scores - slack,
        upper=scores + slack,
        exact=torch.ones_like(scores, dtype=torch.bool),
        tolerance=tolerance,
        refined=0,
        evaluated=0,
    )


def _baseline(blocks: Sequence[Decomposition], out: ReadOut, target: Target) -> Baseline:
    return out.baseline(torch.stack([block.base for block in blocks]), target)


def _reversed(target: Target) -> Target:
    """The contrast whose scores are the negatives of this one's."""
    assert target.against is not None
    return replace(target.against, against=replace(target, against=None))


def _kind(blocks: Sequence[Decomposition]) -> Kind:
    return "attn" if isinstance(blocks[0], AttnDecomposition) else "ffn"


def _checked(
    blocks: Sequence[Decomposition], out: ReadOut, index: ProjectionIndex | None
) -> ProjectionIndex:
    """The index, if there is one and it may be of this model."""
    if index is None:
        raise InputError("this needs the model's projection index; give projection_index(model)")
    n_layers, n_rows = getattr(index, _kind(blocks)).low.shape
    layers = 1 + max(block.layer for block in blocks)
    rows, d_vocab = len(blocks[0].rows()), out.W_U.shape[1]
    if layers > n_layers or rows != n_rows or d_vocab != index.d_vocab:
        raise InputError(
            f"the projection index is of another model: {n_layers} layers of {n_rows} subvalues "
            f"and {index.d_vocab} tokens, where this has {layers} or more of {rows}, and "
            f"{d_vocab}; make one with projection_index(model)"
        )
    return index


def _best_and_rest(scores: Float[Tensor, "layer neuron"], top: int) -> tuple[float, float]:
    """Sums of the ``top`` largest positive scores, and of the other positive ones."""
    positive = scores.flatten().clamp(min=0)
    total = float(positive.sum(dtype=torch.float64))
    best = float(positive.topk(min(top, len(positive))).values.sum(dtype=torch.float64))
    return best, max(0.0, total - best) if top < len(positive) else 0.0
