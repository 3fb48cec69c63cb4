"""The best, proven: the top neurons of a kind, exactly, without scoring every neuron.

With a frozen norm the logits are affine in the residual vector, so log p(w | x) is concave in x,
and the first-order score ``u . g`` (g the gradient of log p at the base) is never below the exact
score of u. One matrix-vector product per layer bounds every neuron's score; the exact scores are
then computed in order of the bound, until the k-th best is no smaller than every bound left. Where
logits pass through a soft cap log p is nearly concave: bounds are raised by what the cap can bend.

Rounding: both numbers are computed in finite precision, so each bound is raised by a slack. A dot
product of d terms rounds by about ``sqrt(d) eps`` of the product of the norms (the probabilistic
analysis of Higham & Mary, 2019; the deterministic bound has d in place of sqrt(d) and is not met
in practice), taken four times over for the bound and again for the exact score, with the norms of
the target's direction and of those the model considers likely; a logsumexp of probabilities rounds
by a few eps. The certificate is a proof up to that model of rounding; in float64 the slack is 10^9
times smaller.

Several accepted answers: their log p is not concave, but the rise of it is the log of a mean of the
answers' factors, ``log sum_w s_w exp(score of w)``, which grows with each of them. So each answer's
bound in the place of its score bounds it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.baselines import Baseline, joint_rise
from tl_neuron_attr.decompose import AttnDecomposition, Decomposition, rows_at, slopes
from tl_neuron_attr.display import Grid, box, brief, grid, line
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Kind
from tl_neuron_attr.norms import row_norms
from tl_neuron_attr.pieces import Matrix, Pieces
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import Target, at_least_one
from tl_neuron_attr.readout import ReadOut
from tl_neuron_attr.scores import Progress, finite, neuron_scores_from

Bounds = Callable[[Sequence[int]], tuple[Float[Tensor, "run neuron"], Float[Tensor, " run"]]]
"""Gives, for one block of each of the runs asked for, a number that no neuron's score exceeds, -inf
for neurons that are off (they score 0), and the largest slack among them. The runs have as many
neurons. Called anew each time it is needed: the bounds of all blocks of a long prompt together
would take more memory than its activations."""

_LINED_UP = 2**21
"""How many neurons of one block, over several runs, are bounded at a time: 8 MiB in float32."""


_WORTH_A_PASS = 128
"""How many neurons of a layer are worth a pass over the unembedding of their own: with fewer, what
is read weighs more than what is computed."""

_SHOWN = 10
"""How many neurons a notebook shows of a list."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Why the neurons listed are the best: no neuron left out can score above the last of them."""

    applies: bool
    """False where no bound holds: every neuron was scored. (With a recomputed norm; and, where a
    soft cap is on logits, for the lowest scores and for differences, which need intervals.)"""
    linear: bool
    """True for a contrast under a frozen norm: scores are linear, so that one product gives all
    of them exactly, and there is nothing to bound."""
    evaluated: int
    """Neurons scored exactly (those whose coefficient is 0 score 0, and are not counted)."""
    total: int
    """Neurons there are."""
    kth_score: float
    """Exact score of the last neuron listed, in nats."""
    next_bound: float | None
    """Largest bound, slack included, of an active neuron not scored; ``None`` if there is none."""
    slack: float
    """Largest allowance for rounding in any bound, in nats."""
    lowest: bool = False
    """Whether the list is of the lowest scores: ``next_bound`` then bounds scores from below."""

    @classmethod
    def of_all(cls, total: int, score: Float[Tensor, " best"]) -> "Certificate":
        """Nothing was bounded: scores are linear, and every one was computed."""
        return cls(
            applies=True,
            linear=True,
            evaluated=total,
            total=total,
            kth_score=float(score[-1]) if len(score) else 0.0,
            next_bound=None,
            slack=0.0,
        )

    __repr__ = brief

    @property
    def holds(self) -> bool:
        """Whether the list is proven complete."""
        if self.next_bound is None:
            return True
        if self.lowest:
            return self.next_bound >= self.kth_score
        return self.next_bound <= self.kth_score

    def __str__(self) -> str:
        """Why, in a sentence without its subject."""
        if not self.applies:
            return (
                f"all {self.total:,} scored, as no bound holds that would exclude any: the norm is "
                "recomputed, or a soft cap is on logits"
            )
        if self.linear:
            return f"of {self.total:,}; a contrast is linear, so all are scored exactly"
        verb = "exclude" if self.holds else "do not exclude"
        return (
            f"proven of {self.total:,}: {self.evaluated:,} scored exactly, bounds {verb} the others"
        )

    def _repr_html_(self) -> str:
        order = "below" if self.lowest else "above"
        rest = "no active neuron is left"
        if self.next_bound is not None:
            rest = f"no other can score {order} {self.next_bound:.6g}"
        return box(
            "Certificate: why the neurons listed are the best",
            line(str(self)),
            line(
                f"The last one listed scores {self.kth_score:.6g} nats, and {rest}; this allows "
                f"{self.slack:.2g} nats for rounding"
            ),
        )


@dataclass(frozen=True, kw_only=True)
class RankedNeurons:
    """Neurons of one kind, best score first; ties by layer, then number within the layer."""

    kind: Kind
    layer: Int[Tensor, " neuron"]
    number: Int[Tensor, " neuron"]
    """What the layer's decomposition calls the neuron."""
    head: Int[Tensor, " neuron"] | None
    """``None`` for FFN neurons."""
    source_pos: Int[Tensor, " neuron"] | None
    """``None`` for FFN neurons and for attention neurons summed over source positions."""
    index: Int[Tensor, " neuron"]
    """Place in ``d_mlp``, or in ``d_head``."""
    coefficient: Float[Tensor, " neuron"]
    score: Float[Tensor, " neuron"]
    """Rise in log p(target), in nats."""
    certificate: Certificate

    def __len__(self) -> int:
        return self.score.shape[0]

    def __repr__(self) -> str:
        name = "FFN" if self.kind == "ffn" else "attention"
        few = ", ".join(
            f"{neuron} {score:+.4g}"
            for neuron, score in zip(self.first(3).neurons(), self.score[:3].tolist(), strict=True)
        )
        return f"RankedNeurons({len(self):,} {name} neurons: {few}{', ...' * (len(self) > 3)} nats)"

    def _repr_html_(self) -> str:
        shown = self.first(_SHOWN)
        name = "FFN" if self.kind == "ffn" else "attention"
        rows = zip(shown.neurons(), shown.score.tolist(), shown.coefficient.tolist(), strict=True)
        return box(
            f"{len(self):,} {name} neurons, best first",
            grid(
                Grid(
                    header=("neuron", "score, nats", "coefficient"),
                    rows=tuple((str(neuron), *numbers) for neuron, *numbers in rows),
                    bars=frozenset({1}),
                    more=len(self) - len(shown),
                )
            ),
            line(f"Certificate: {self.certificate}"),
        )

    def first(self, top: int) -> "RankedNeurons":
        """The ``top`` best of them."""
        return self.at(torch.arange(min(top, len(self)), device=self.score.device))

    def at(self, places: Int[Tensor, " some"]) -> "RankedNeurons":
        """Those at these places of the list, in this order."""
        columns = {
            name: getattr(self, name)[places]
            for name in ("layer", "number", "head", "source_pos", "index", "coefficient", "score")
            if getattr(self, name) is not None
        }
        return replace(self, **columns)

    def neurons(self) -> list[FFNNeuron] | list[AttnNeuron]:
        """The same neurons as values, in order."""
        layers, indices = self.layer.tolist(), self.index.tolist()
        if self.head is None:
            return [FFNNeuron(*place) for place in zip(layers, indices, strict=True)]
        heads = self.head.tolist()
        sources = [None] * len(self) if self.source_pos is None else self.source_pos.tolist()
        return [AttnNeuron(*place) for place in zip(layers, heads, indices, sources, strict=True)]


@full_precision()
def top_neurons(
    decompositions: Sequence[Decomposition],
    out: ReadOut,
    target: Target,
    top: int,
    *,
    progress: Progress | None = None,
) -> RankedNeurons:
    """The ``top`` best neurons among blocks of one kind (all of them, if there are fewer).

    Exactly those a dense evaluation of every neuron would list first, with a certificate. Where
    no bound holds (a recomputed norm) every neuron is scored.

    Cost: a gradient and a matrix-vector product per layer, then about one read-out per neuron
    listed; dense, one read-out per neuron there is. For a contrast, the product alone.
    """
    top = at_least_one(top, "top")
    if not decompositions:
        raise InputError("there are no decompositions to find the best neurons of")
    before = out.baseline(torch.stack([block.base for block in decompositions]), target)
    return top_neurons_of_runs([decompositions], out, before, top, progress=progress)[0]


@full_precision()
def top_neurons_of_runs(
    runs: Sequence[Sequence[Decomposition]],
    out: ReadOut,
    before: Baseline,
    top: int,
    *,
    progress: Progress | None = None,
) -> list[RankedNeurons]:
    """The same for several runs of one model, or several targets, whose read-outs are shared.

    ``before`` has one base a block: a run's blocks in order, run after run.
    """
    n_layers = len(runs[0])
    bases = torch.arange(len(before), device=before.resid.device).view(len(runs), n_layers)
    tangents = tangent_bounds(runs, out, before)
    found: dict[int, RankedNeurons] = {}
    for run, blocks in enumerate(runs):
        if tangents is not None and out.affine and before.aims.against is not None:
            found[run] = _best_linear(blocks, tangents[run], top)
        elif tangents is None or 2 * top >= sum(block.n_neurons for block in blocks):
            found[run] = _best_of_all(blocks, out, before[bases[run]], top, progress)
    searched = [run for run in range(len(runs)) if run not in found]
    if tangents is not None and searched:
        ranked = best_by_bound(
            [runs[run] for run in searched],
            [
                _tangents_above([tangents[run][layer] for run in searched])
                for layer in range(n_layers)
            ],
            out,
            before[bases[searched].flatten()],
            top,
            progress=progress,
        )
        found |= dict(zip(searched, ranked, strict=True))
    return [found[run] for run in range(len(runs))]


# --- bounds -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AnswerSlopes:
    """The first-order pictures of several accepted answers, in one block."""

    slopes: Float[Tensor, "answer subvalue"]
    log_share: Float[Tensor, " answer"]
    """The log of each answer's share of their probability, at the base."""

    def rise(
        self, coefficients: Float[Tensor, " neuron"], slopes: Float[Tensor, "answer neuron"]
    ) -> Float[Tensor, " neuron"]:
        """That of the log of their summed probability, each answer's being linear."""
        return joint_rise(coefficients * slopes, self.log_share[:, None])


@dataclass(frozen=True, kw_only=True)
class TangentBound:
    """The first-order picture of one block's scores."""

    block: Decomposition
    slope: Float[Tensor, " subvalue"]
    """Rise of log p(target) per unit of coefficient, at the base."""
    slack: Float[Tensor, " subvalue"]
    """Allowance for rounding per unit of coefficient."""
    constant: float
    """Allowance for the rounding of a logsumexp."""
    bend: Float[Tensor, " subvalue"] | None
    """Allowance for a soft cap, per squared coefficient."""
    answers: AnswerSlopes | None = None
    """Of several accepted answers; ``slope`` is then that of their gradient, and no bound."""

    def rise(self, coefficients: Float[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
        """What the first-order picture says of every neuron of the block."""
        if self.answers is None:
            return coefficients * self.block.of_each(self.slope)
        return self.answers.rise(coefficients, self.block.of_each(self.answers.slopes))

    def above(self) -> tuple[Float[Tensor, " neuron"], Float[Tensor, ""]]:
        """A number that no neuron's score exceeds (-inf for those that are off), and the slack."""
        (bounds,), (slack,) = bounds_above([self])
        return bounds, slack

    def linear(self) -> Float[Tensor, " neuron"]:
        """The scores themselves, where they are linear."""
        return self.rise(self.block.all_coefficients())


def bounds_above(
    tangents: Sequence[TangentBound],
) -> tuple[Float[Tensor, "run neuron"], Float[Tensor, " run"]]:
    """The same for one block of several runs that have as many neurons."""
    block, constant = tangents[0].block, tangents[0].constant
    coefficients = torch.stack([each.block.all_coefficients() for each in tangents])
    slack = block.of_each(torch.stack([each.slack for each in tangents])) * coefficients.abs()
    if tangents[0].answers is None:
        slopes = block.of_each(torch.stack([each.slope for each in tangents]))
        first_order = coefficients * slopes
    else:
        rises = [each.rise(row) for each, row in zip(tangents, coefficients, strict=True)]
        first_order = torch.stack(rises)
    bounds = first_order + slack + constant
    if tangents[0].bend is not None:
        bends = torch.stack([each.bend for each in tangents if each.bend is not None])
        bounds = bounds + block.of_each(bends) * coefficients.square()
    return bounds.where(coefficients != 0, -torch.inf), slack.amax(1) + constant


def _tangents_above(tangents: Sequence[TangentBound]) -> Bounds:
    """Bounds of one block, of which each run has its tangent."""
    return lambda runs: bounds_above([tangents[run] for run in runs])


def bounds_of_one_run(
    bounds: Callable[[], tuple[Float[Tensor, " neuron"], Float[Tensor, ""]]],
) -> Bounds:
    """Bounds of one block, where there is one run."""

    def of(runs: Sequence[int]) -> tuple[Float[Tensor, "run neuron"], Float[Tensor, " run"]]:
        above, slack = bounds()
        return above[None], slack[None]

    return of


@full_precision()
def tangent_bounds(
    runs: Sequence[Sequence[Decomposition]], out: ReadOut, before: Baseline
) -> list[list[TangentBound]] | None:
    """The bounds of every block of every run; ``None`` if the norm is recomputed: none hold then.

    ``before`` has one base a block: a run's blocks in order, run after run.
    Source: log p is concave in the residual vector, so its tangent lies above it; under a soft cap
    nearly so (see ``Tangent``).
    Cost: one matrix product a layer, which reads its weights once for all runs; of several accepted
    answers one for each.
    """
    tangent = before.tangent
    if tangent is None:
        return None
    if tangent.answers:
        each = [
            tangent_bounds(runs, out, replace(before, tangent=answer, log_share=None))
            for answer in tangent.answers
        ]
        return _of_answers([bounds for bounds in each if bounds is not None], before)
    eps = torch.finfo(out.dtype).eps
    relative = 8 * math.sqrt(tangent.gradient.shape[1]) * eps
    bends = [None] * len(before) if tangent.bend is None else tangent.bend
    n_layers = len(runs[0])
    columns = []
    for layer, block in enumerate(runs[0]):
        gradients = tangent.gradient[layer::n_layers]
        outlets = [run[layer].outlet for run in runs]
        gradients = torch.stack([go(g) for go, g in zip(outlets, gradients, strict=True)])
        products = slopes(_rows_of_all([run[layer] for run in runs]), gradients)
        known = None if out.norms is None else out.norms.of_rows(block.rows())
        if known is None or tangent.bend is not None:  # of a bend they are no mere allowance
            known = row_norms(block.rows(), block.outlet.gain).to(block.base.device)
        columns.append(
            [
                TangentBound(
                    block=run[layer],
                    slope=slope,
                    slack=relative * reach * go.of_norms(known).to(out.dtype),
                    constant=32 * eps,
                    bend=None
                    if bend is None
                    else bend * (1 + relative) * go.of_norms(known).to(out.dtype).square(),
                )
                for run, go, slope, reach, bend in zip(
                    runs,
                    outlets,
                    products,
                    tangent.reach[layer::n_layers],
                    bends[layer::n_layers],
                    strict=True,
                )
            ]
        )
    return [list(run) for run in zip(*columns, strict=True)]


def _rows_of_all(blocks: Sequence[Decomposition]) -> Matrix:
    """The rows of one layer, experts that are off in every run left out."""
    rows = blocks[0].rows()
    used = [own.of_use for own in (block.rows() for block in blocks) if isinstance(own, Pieces)]
    if not isinstance(rows, Pieces) or None in used:
        return rows if not isinstance(rows, Pieces) else replace(rows, of_use=None)
    return rows.using(frozenset().union(*(each for each in used if each is not None)))


def _of_answers(
    each: Sequence[list[list[TangentBound]]], before: Baseline
) -> list[list[TangentBound]]:
    """The bounds of several accepted answers, given by answer, run and layer, as those of all."""
    shares, n_layers = before.log_share, len(each[0][0])
    assert shares is not None

    def together(run: int, layer: int) -> TangentBound:
        bounds = [answer[run][layer] for answer in each]
        log_share = shares[run * n_layers + layer]
        slopes = torch.stack([bound.slope for bound in bounds])
        bends = [bound.bend for bound in bounds if bound.bend is not None]
        return replace(
            bounds[0],
            slope=log_share.exp().to(slopes) @ slopes,
            slack=torch.stack([bound.slack for bound in bounds]).amax(0),
            constant=2 * bounds[0].constant,  # two logsumexps
            bend=torch.stack(bends).amax(0) if bends else None,
            answers=AnswerSlopes(slopes=slopes, log_share=log_share.to(slopes)),
        )

    return [[together(run, layer) for layer in range(n_layers)] for run in range(len(each[0]))]


def score_bounds(
    decompositions: Sequence[Decomposition], out: ReadOut, before: Baseline
) -> tuple[Float[Tensor, " neuron"], float]:
    """An upper bound of every neuron's score over all blocks, slack included; the largest slack.

    Exactly 0, without slack, for a neuron whose coefficient is 0: its score is 0.

    Raises:
        InputError: If the norm is recomputed, for then no bound holds.
    """
    tangents = tangent_bounds([decompositions], out, before)
    if tangents is None:
        raise InputError("a recomputed norm has no bounds; use exact or published")
    above = [bound.above() for bound in tangents[0]]
    bounds = torch.cat([bound for bound, _ in above])
    return bounds.where(~bounds.isneginf(), 0.0), max(float(slack) for _, slack in above)


# --- search -----------------------------------------------------------------------------------


@full_precision()
def best_by_bound(
    runs: Sequence[Sequence[Decomposition]],
    bounds: Sequence[Bounds],
    out: ReadOut,
    before: Baseline,
    top: int,
    *,
    lowest: bool = False,
    progress: Progress | None = None,
) -> list[RankedNeurons]:
    """Exact scores in order of the bound, until the ``top``-th best reaches every bound left.

    With ``lowest`` the neurons that lower log p(target) most: ``bounds`` are then of the scores'
    negatives. The runs go side by side, so that one read-out serves neurons of all of them.
    """

    def scores_of(flats: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, " neuron"]:
        return _exact(runs, flats, out, before)

    return best_by_bound_of(runs, bounds, scores_of, top, lowest=lowest, progress=progress)


def best_by_bound_of(
    runs: Sequence[Sequence[Decomposition]],
    bounds: Sequence[Bounds],
    scores_of: Callable[[Sequence[Int[Tensor, " _"]]], Float[Tensor, " neuron"]],
    top: int,
    *,
    lowest: bool = False,
    progress: Progress | None = None,
) -> list[RankedNeurons]:
    """The same search for any score: ``scores_of`` gives it exactly, run after run.

    It is asked about each run's neurons by their numbers across the run's blocks. What ``bounds``
    says -inf of scores 0.
    """
    sign = -1.0 if lowest else 1.0
    races = [_Race(run=run, blocks=blocks, top=top) for run, blocks in enumerate(runs)]
    for some in _alike(races):
        _line_up(some, bounds)
    while True:
        for race in races:
            if race.must_look_further():
                race.size *= 4
                _line_up([race], bounds)
        asked = [race.ask() for race in races]
        lengths = [len(some) for some in asked]
        if not any(lengths):
            break
        scores = sign * scores_of(asked)
        for race, some, score in zip(races, asked, scores.split(lengths), strict=True):
            race.take(some, score)
        if progress is not None:
            progress(sum(lengths))
    return [race.ranked(sign) for race in races]


@dataclass(kw_only=True)
class _Race:
    """The search in one run: which neurons were scored, and which bounds come next."""

    run: int
    """Its place among the runs."""
    blocks: Sequence[Decomposition]
    top: int
    flat: Int[Tensor, " scored"] | None = None
    """Numbers, across all blocks, of the neurons whose score is known (0 for those off)."""
    scores: Float[Tensor, " scored"] = field(init=False)
    waiting: Int[Tensor, " waiting"] = field(init=False)
    """The neurons with the largest bounds of those not scored, largest first."""
    waiting_bounds: Float[Tensor, " waiting"] = field(init=False)
    beyond: float = -math.inf
    """Largest bound of the active neurons that are neither scored nor waiting."""
    size: int = field(init=False)
    """How many wait at most."""
    batch: int = 0
    """How many to ask for next; 0 at first."""
    evaluated: int = 0
    slack: float = 0.0

    def __post_init__(self) -> None:
        self.size = 2 * self.top

    def line_up(
        self, numbers: Int[Tensor, " waiting"], bounds: Float[Tensor, " waiting"], beyond: float
    ) -> None:
        """Let these neurons wait; no bound left out is above ``beyond``."""
        self.waiting, self.waiting_bounds, self.beyond = numbers, bounds, beyond

    def start(self, off: Int[Tensor, " off"], slack: float) -> None:
        """Note what is known before any score: the first of the neurons that are off score 0."""
        self.flat, self.slack = off, slack
        self.scores = self.waiting_bounds.new_zeros(len(self.flat))

    def must_look_further(self) -> bool:
        """Whether bounds that are not waiting may still hide one of the best."""
        return len(self.waiting) == 0 and self.beyond >= self._kth() and self.beyond > -math.inf

    def ask(self) -> Int[Tensor, " neuron"]:
        """Which neurons to score next; none if the best are proven."""
        if self.batch == 0:
            # on trained models the best are nearly always among these: one read-out does
            self.batch = max(8, self.top // 16)
            return self.waiting[: self.top + self.top // 16]
        worth = int((self.waiting_bounds >= self._kth()).sum())
        some = self.waiting[: min(self.batch, worth)]
        self.batch *= 2  # where bounds are loose, few rounds over all of them
        return some

    def take(self, some: Int[Tensor, " neuron"], scores: Float[Tensor, " neuron"]) -> None:
        """Note the scores of the neurons asked for."""
        assert self.flat is not None
        self.flat = torch.cat([self.flat, some])
        self.scores = torch.cat([self.scores, scores])
        self.waiting = self.waiting[len(some) :]
        self.waiting_bounds = self.waiting_bounds[len(some) :]
        self.evaluated += len(some)

    def ranked(self, sign: float) -> RankedNeurons:
        """The best, once ``ask`` has nothing left to ask for."""
        assert self.flat is not None
        # by number first, so that ties come by layer, then number
        flat, order = self.flat.sort()
        scores = self.scores[order]
        best = largest(scores, self.top)
        left = [float(self.waiting_bounds[0])] if len(self.waiting) else []
        next_bound = max([*left, self.beyond])
        certificate = Certificate(
            applies=True,
            linear=False,
            evaluated=self.evaluated,
            total=sum(block.n_neurons for block in self.blocks),
            kth_score=sign * float(scores[best[-1]]),
            next_bound=None if next_bound == -math.inf else sign * next_bound,
            slack=self.slack,
            lowest=sign < 0,
        )
        return _ranked(self.blocks, flat[best], sign * scores[best], certificate)

    def _kth(self) -> float:
        if len(self.scores) < self.top:
            return -math.inf
        return float(self.scores.topk(self.top).values[-1])


def _alike(races: Sequence[_Race]) -> Iterator[list[_Race]]:
    """Races of as many neurons a block, as many as can be lined up together."""
    shapes: dict[int, list[_Race]] = {}
    for race in races:
        shapes.setdefault(race.blocks[0].n_neurons, []).append(race)
    for n_neurons, some in shapes.items():
        step = max(1, _LINED_UP // n_neurons)
        for first in range(0, len(some), step):
            yield some[first : first + step]


def _line_up(races: Sequence[_Race], bounds: Sequence[Bounds]) -> None:
    """In each race let the neurons wait that have the largest bounds of those not scored.

    The races have as many neurons a block, and as many may wait in each.
    """
    per_block, size = races[0].blocks[0].n_neurons, races[0].size
    runs = [race.run for race in races]
    numbers, values, slacks = [], [], []
    off: list[list[Int[Tensor, " _"]]] = [[] for _ in races]
    for place, bounds_of in enumerate(bounds):
        here, slack = bounds_of(runs)
        silent = here.isneginf()
        # none at all where the activation has no zero: spare the search row by row
        some_off = bool(silent.any())
        for row, race, unlit, known in zip(here, races, silent, off, strict=True):
            if race.flat is not None:
                row[race.flat[race.flat // per_block == place] % per_block] = -torch.inf
            elif some_off:  # the first are enough
                known.append(unlit.nonzero()[: race.top, 0] + place * per_block)
        here = here.nan_to_num(torch.inf, torch.inf, -torch.inf)  # no bound excludes nothing
        number = torch.arange(per_block, device=here.device).expand_as(here)
        if per_block > size + 1:
            here, number = here.topk(size + 1)
        numbers.append(number + place * per_block)
        values.append(here)
        slacks.append(slack)
    merged, order = torch.cat(values, 1).sort(dim=1, descending=True, stable=True)
    number = torch.cat(numbers, 1).gather(1, order)
    active = (merged > -torch.inf).sum(1).tolist()
    slack = torch.stack(slacks).amax(0).tolist()
    for row, race in enumerate(races):
        waiting = min(size, active[row])
        beyond = float(merged[row, size]) if active[row] > size else -math.inf
        race.line_up(number[row, :waiting], merged[row, :waiting], beyond)
        if race.flat is None:
            known = torch.cat([number.new_zeros(0), *off[row]])[: race.top]
            race.start(known.clone(), slack[row])


def _best_of_all(
    blocks: Sequence[Decomposition],
    out: ReadOut,
    before: Baseline,
    top: int,
    progress: Progress | None,
) -> RankedNeurons:
    """The best after scoring every neuron."""
    scores = torch.cat(
        [
            neuron_scores_from(block, out, before[place : place + 1], progress=progress)
            for place, block in enumerate(blocks)
        ]
    )
    best = largest(scores, top)
    certificate = Certificate(
        applies=out.bounded,
        linear=False,
        evaluated=_active(blocks),
        total=len(scores),
        kth_score=float(scores[best[-1]]),
        next_bound=None,
        slack=0.0,
    )
    return _ranked(blocks, best, scores[best], certificate)


def no_intervals(out: ReadOut) -> str:
    """Why a read-out that is not affine has no intervals."""
    if out.soft_cap is None or not out.bounded:
        return "a recomputed norm has no intervals; use exact or published"
    return (
        "there are no intervals where logits pass through a soft cap: scores are bounded from "
        "above only; neuron_scores gives all of them"
    )


def _active(blocks: Sequence[Decomposition]) -> int:
    """How many neurons have a coefficient other than 0."""
    return sum(int(block.all_coefficients().count_nonzero()) for block in blocks)


def _best_linear(
    blocks: Sequence[Decomposition], tangents: Sequence[TangentBound], top: int
) -> RankedNeurons:
    """The best where the first-order picture is the whole picture."""
    numbers, scores = [], []
    for place, (block, tangent) in enumerate(zip(blocks, tangents, strict=True)):
        here = tangent.linear()
        best = largest(here, top).sort().values
        numbers.append(best + place * block.n_neurons)
        scores.append(here[best])
    merged = torch.cat(scores)
    best = largest(merged, top)
    total = sum(block.n_neurons for block in blocks)
    certificate = Certificate(
        applies=True,
        linear=True,
        evaluated=_active(blocks),
        total=total,
        kth_score=float(merged[best[-1]]),
        next_bound=None,
        slack=0.0,
    )
    return _ranked(blocks, torch.cat(numbers)[best], merged[best], certificate)


@full_precision()
def exact_scores(
    decompositions: Sequence[Decomposition],
    out: ReadOut,
    before: Baseline,
    flat: Int[Tensor, " neuron"],
) -> Float[Tensor, " neuron"]:
    """Exact scores of neurons of any layer, given by their number across all blocks, together."""
    return _exact([decompositions], [flat], out, before)


def _exact(
    runs: Sequence[Sequence[Decomposition]],
    flats: Sequence[Int[Tensor, " _"]],
    out: ReadOut,
    before: Baseline,
) -> Float[Tensor, " neuron"]:
    """The scores of each run's neurons, given by their number across its blocks, run after run."""
    n_runs, per_block = len(runs), [blocks[0].n_neurons for blocks in runs]
    layer = torch.cat([flat // n for flat, n in zip(flats, per_block, strict=True)])
    number = torch.cat([flat % n for flat, n in zip(flats, per_block, strict=True)])
    lengths = torch.tensor([len(flat) for flat in flats], device=layer.device)
    run = torch.arange(n_runs, device=layer.device).repeat_interleave(lengths)
    base = run * len(runs[0]) + layer
    scores = before.resid.new_empty(len(base), dtype=out.dtype)
    if len(base) < _WORTH_A_PASS * len(runs[0]):
        # few: neurons of all layers share a pass over the unembedding
        order = base.argsort(stable=True)  # those of one base together: they share its prediction
        for here in order.split(out.rows_per_block):
            vectors = [
                runs[each // len(runs[0])][each % len(runs[0])].vectors(numbers)
                for each, numbers in _consecutive(base[here], number[here])
            ]
            scores[here] = finite(out.increase(before, base[here], torch.cat(vectors)))
        return scores
    # many: a pass a layer, in which neurons of several runs that have one subvalue share it
    order = (layer * n_runs + run).argsort(stable=True)
    for place, here in _consecutive(layer[order], order):
        multiples, row_of = [], []
        for each, numbers in _consecutive(run[here], number[here]):
            block = runs[each][place]
            multiples.append(block.outlet.scaled(block.coefficients_of(numbers)))
            row_of.append(block.row_of(numbers))
        rows, row_of = torch.cat(row_of).unique(return_inverse=True)
        scores[here] = finite(
            _increases(out, before, base[here], torch.cat(multiples), runs[0][place], rows, row_of)
        )
    return scores


def _increases(
    out: ReadOut,
    before: Baseline,
    bases: Int[Tensor, " neuron"],
    multiples: Float[Tensor, " neuron"],
    block: Decomposition,
    rows: Int[Tensor, " row"],
    row_of: Int[Tensor, " neuron"],
) -> Float[Tensor, " neuron"]:
    """Of multiples of some rows of one block, as many rows at a time as are read out at a time."""
    size = out.rows_per_block
    found = torch.empty_like(multiples)
    for first in range(0, len(rows), size):
        (here,) = ((row_of >= first) & (row_of < first + size)).nonzero(as_tuple=True)
        some = rows_at(block.rows(), rows[first : first + size]).to(block.base)
        vectors = block.outlet.weighted(some)
        found[here] = out.increase_of_multiples(
            before, bases[here], multiples[here], vectors, row_of[here] - first
        )
    return found


def largest(values: Float[Tensor, " neuron"], k: int) -> Int[Tensor, " best"]:
    """Where the ``k`` largest are, largest first; of equals the first (topk takes any)."""
    if len(values) == 0:
        return values.new_zeros(0, dtype=torch.long)
    if len(values) <= 4 * k:
        return values.sort(descending=True, stable=True).indices[:k]
    kth = values.topk(min(k, len(values))).values[-1]
    above = (values > kth).nonzero()[:, 0]
    level = (values == kth).nonzero()[: k - len(above), 0]
    places = torch.cat([above, level]).sort().values
    return places[values[places].sort(descending=True, stable=True).indices]


def _ranked(
    decompositions: Sequence[Decomposition],
    flat: Int[Tensor, " neuron"],
    score: Float[Tensor, " neuron"],
    certificate: Certificate,
) -> RankedNeurons:
    """Neurons given by their number across all ``decompositions``, in the order given."""
    first = decompositions[0]
    per_block = first.n_neurons
    place, number = flat // per_block, flat % per_block
    coefficient = coefficients_at(decompositions, flat).to(score.dtype)
    layer = torch.tensor([block.layer for block in decompositions], device=flat.device)[place]
    head = source_pos = None
    index = number
    if isinstance(first, AttnDecomposition):
        head, source_pos, index = first.place(number)
        source_pos = None if first.summed else source_pos
    return RankedNeurons(
        kind="ffn" if head is None else "attn",
        layer=layer,
        number=number,
        head=head,
        source_pos=source_pos,
        index=index,
        coefficient=coefficient,
        score=score,
        certificate=certificate,
    )


def coefficients_at(
    decompositions: Sequence[Decomposition], flat: Int[Tensor, " neuron"]
) -> Float[Tensor, " neuron"]:
    """The coefficient of neurons given by their number across all ``decompositions``."""
    first = decompositions[0]
    number = flat % first.n_neurons
    coefficients = torch.empty(len(flat), dtype=first.base.dtype, device=flat.device)
    for here, block in _by_block(flat // first.n_neurons, decompositions):
        coefficients[here] = block.coefficients_of(number[here])
    return coefficients


def subvalues_of(
    decompositions: Sequence[Decomposition], neurons: RankedNeurons
) -> Float[Tensor, "neuron d_model"]:
    """The subvalue of each of these neurons, in their order."""
    layers = torch.tensor([block.layer for block in decompositions], device=neurons.layer.device)
    place = torch.searchsorted(layers, neurons.layer)
    rows = decompositions[0].base.new_empty(len(neurons), decompositions[0].base.shape[0])
    for here, block in _by_block(place, decompositions):
        rows[here] = block.subvalues(neurons.number[here])
    return rows


def _by_block(
    place: Int[Tensor, " neuron"], decompositions: Sequence[Decomposition]
) -> Iterator[tuple[Int[Tensor, " some"], Decomposition]]:
    """Each block that has some of the neurons, with where those are among them."""
    order = place.argsort(stable=True)
    for number, here in _consecutive(place[order], order):
        yield here, decompositions[number]


def _consecutive(
    sorted_by: Int[Tensor, " neuron"], values: Int[Tensor, " neuron"]
) -> Iterator[tuple[int, Int[Tensor, " some"]]]:
    """The values of each number in turn, by which they are sorted."""
    numbers, counts = sorted_by.unique_consecutive(return_counts=True)
    yield from zip(numbers.tolist(), values.split(counts.tolist()), strict=True)
