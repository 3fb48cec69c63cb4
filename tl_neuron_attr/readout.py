"""What it says: residual vector -> log p(token), and the conventions for reading out.

The only module that takes a softmax over the vocabulary. With the final norm frozen at the scale
it had in the full run, the logits are affine in the residual vector ``x``::

    z(x) = ((x - mean x) / s * gain + bias) @ W_U + b_U     LayerNorm
    z(x) =  x / s * gain @ W_U + b_U                        RMSNorm
    log p(w | x) = z_w - logsumexp(z)

``exact`` keeps every bias and the model's own eps, so that log p(w | final residual) is the
model's own log-probability. ``published`` is what the notebooks of Yu & Ananiadou (2024) compute:
LayerNorm without its bias, RMSNorm with eps 1e-6, no ``b_U``. ``recomputed`` takes the norm's
scale from each ``x`` itself (the logit lens); it is not affine.

What is explained is log p of a token, or what a ``Target`` says in its place::

    a contrast          log p(w) - log p(v) = z_w - z_v
    accepted answers    log of the sum of their p = logsumexp of their z - logsumexp(z)
    a distribution q    -KL(q || p) = E_q[z] - logsumexp(z) + entropy of q

Where a model caps its logits (Gemma 2), ``c tanh(z / c)`` takes the place of z in every convention,
and none is affine. log p is then not concave in x, but nearly: see ``Tangent``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.baselines import (
    Aims,
    Answers,
    Baseline,
    Deviations,
    Tangent,
    Wanted,
    joint_rise,
)
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host
from tl_neuron_attr.norms import WeightNorms, column_norms, weight_norms
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import Distribution, Target
from tl_neuron_attr.rivals import Rivals

Convention = Literal["exact", "published", "recomputed"]
"""How a residual vector is read out as a log-probability: see this module's docstring."""

CONVENTIONS: tuple[Convention, ...] = ("exact", "published", "recomputed")

DEFAULT_BUDGET = 2**30
"""Bytes a read-out may use for its working set, beyond its arguments and its result."""

# One block of logits is this many rows by this many vocabulary entries: 8 MiB in float32, which
# stays in cache between the matrix product and the logsumexp (measured 1.6 x faster than
# whole-vocabulary rows at GPT-2-small shape on 2 cores).
_ROWS, _COLUMNS = 512, 4096

# A survey has few rows, and is bound by reading the unembedding: its blocks are small enough that
# the second product finds them in cache (one pass of 1,024 columns at a time took 0.4 of the time
# of two passes of 4,096, same machine and shape).
_SURVEY_COLUMNS = 1024

# Neurons of one row, on average, from which on the row's logits are taken once for all of them.
_SHARED_ROW_BY = 1.5

# Rows of one prediction, on average, from which on they are taken prediction by prediction; and the
# least sum of probabilities that is summed plainly, in float32 or wider.
_SHARED_BY, _LEAST = 8, math.exp(-30)

_PUBLISHED_RMS_EPS = 1e-6


_Moved = Callable[[Tensor, Tensor | slice], Tensor]


@dataclass(frozen=True, kw_only=True)
class ReadOut:
    """The final norm and the unembedding, as one function of a residual vector.

    Scores are computed in ``dtype`` whatever the dtype of ``W_U``, which is used as it lies in
    memory: lower-precision weights are widened one block at a time, never copied whole.
    """

    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"] | None
    gain: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    norm_scale: Float[Tensor, ""] | None
    """Divisor of the frozen norm: sqrt(variance or mean square + eps); ``None`` if recomputed."""
    centered: bool
    """Whether the norm subtracts the mean (LayerNorm)."""
    eps: float
    dtype: torch.dtype
    budget: int = DEFAULT_BUDGET
    """Bytes for the working set; it changes speed, never the result beyond rounding."""
    soft_cap: float | None = None
    """Logits z become ``soft_cap * tanh(z / soft_cap)``; ``None``: they stay as they are."""
    norms: WeightNorms | None = None
    """Of the model's weights, where they are known already: for the allowance for rounding."""

    __repr__ = brief

    @property
    def affine(self) -> bool:
        """Whether logits are affine in the residual vector, as intervals of scores require."""
        return self.norm_scale is not None and self.soft_cap is None

    @property
    def bounded(self) -> bool:
        """Whether scores have a first-order bound: wherever the norm is frozen."""
        return self.norm_scale is not None

    @property
    def rows_per_block(self) -> int:
        """How many vectors are read out at a time within the budget."""
        return _rows_per_block(self.W_U, self.dtype, self.budget, self.soft_cap is not None)

    @property
    def whole_rows(self) -> int:
        """How many vectors' logits of the whole vocabulary fit."""
        return max(1, self.rows_per_block * _COLUMNS // max(self.W_U.shape[1], _COLUMNS))

    def frozen_at(self, resid_final: Float[Tensor, " d_model"]) -> "ReadOut":
        """The same read-out, its norm frozen at the scale that another run ended with.

        One whose norm is recomputed stays as it is.
        """
        if self.norm_scale is None:
            return self
        return self._frozen_at(resid_final)

    def _frozen_at(self, resid_final: Float[Tensor, " d_model"]) -> "ReadOut":
        centred = self._centred(resid_final)
        return replace(self, norm_scale=(centred.pow(2).mean() + self.eps).sqrt())

    def linear(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The frozen norm's linear part: what adding a vector adds to the final norm's output.

        Raises:
            InputError: If the norm is recomputed, for then it has no linear part.
        """
        if self.norm_scale is None:
            raise InputError("a recomputed norm has no linear part; use exact or published")
        return self._weighted(self._centred(vectors) / self.norm_scale)

    def normalize(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The final norm's output for each residual vector."""
        resid = self._centred(resid)
        scale = self.norm_scale
        if scale is None:
            scale = (resid.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        normalized = self._weighted(resid / scale)
        return normalized if self.bias is None else normalized + self.bias.to(self.dtype)

    @full_precision()
    def logits(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """All logits of each residual vector. Cost: batch x d_vocab floats of memory."""
        normalized = self.normalize(resid)
        blocks = [self._logit_block(normalized, columns) for columns in self._vocabulary()]
        return torch.cat(blocks, dim=-1)

    @full_precision()
    def log_prob(
        self, resid: Float[Tensor, "*batch d_model"], target: Target
    ) -> Float[Tensor, "*batch"]:
        """log p(target | resid) of each residual vector, in nats, within the budget.

        For a contrast the difference of the two log-probabilities, at the cost of two logits; for
        accepted answers that of any of them; for a distribution -KL(it || prediction).
        """
        rows = resid.reshape(-1, resid.shape[-1])
        aims = self._aims([target], [len(rows)], rows.device)
        return self._log_prob(rows, aims).reshape(resid.shape[:-1])

    @full_precision()
    def log_prob_towards(
        self,
        resid: Float[Tensor, "station position d_model"],
        final: Float[Tensor, "position d_model"],
        target: Target,
    ) -> Float[Tensor, "station position"]:
        """log p(target) of residual vectors at several positions, in nats, within the budget.

        A frozen norm has, at each position, the scale of ``final`` there, not that of this
        read-out's own run; a recomputed one that of each vector, as ever.
        """
        if self.norm_scale is not None:
            scale = (self._centred(final).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
            resid = self._at_scale(resid, scale)
        return self.log_prob(resid, target)

    @full_precision()
    def log_prob_of_each(
        self, resid: Float[Tensor, "row d_model"], targets: Sequence[Target]
    ) -> Float[Tensor, " row"]:
        """The same for a target of each row's own.

        Raises:
            InputError: If targets are not of one form.
        """
        return self._log_prob(resid, self._aims(targets, [1] * len(targets), resid.device))

    @full_precision()
    def answers(self, resid: Float[Tensor, "row d_model"], targets: Sequence[Target]) -> "Answers":
        """What is made of each row's target token; of a contrast, of the first of the two.

        Of several accepted answers, of all together, and the rank of the likeliest. Cost: one pass
        over the unembedding; the logits of a few hundred rows at a time.

        Raises:
            InputError: Of a distribution, which is no answer.
        """
        if any(target.distribution is not None for target in targets):
            raise InputError(
                "a whole distribution has no rank and no probability; attribute the prompt with a "
                "token, or a set of them, as target"
            )
        most = max([1, *(len(target.answers) for target in targets)])
        # those with fewer answers have their first several times, which counts once
        ids = torch.tensor(
            [
                [each.id for each in target.answers] + [target.id] * (most - len(target.answers))
                for target in targets
            ],
            device=resid.device,
        ).view(len(targets), most)
        counts = torch.tensor([len(target.answers) for target in targets], device=resid.device)
        repeated = torch.arange(most, device=resid.device) >= counts[:, None]
        found: list[tuple[Tensor, Tensor]] = []
        for rows, tokens, again in zip(
            *(each.split(self.whole_rows) for each in (resid, ids, repeated)), strict=True
        ):
            logits = self.logits(rows)
            # of these very logits: computed anew it might round to another place among them
            own = logits.gather(1, tokens)
            best = own.amax(1, True)
            own = own.masked_fill(again, -torch.inf).logsumexp(1) if most > 1 else own[:, 0]
            found.append((own - logits.logsumexp(1), 1 + (logits > best).sum(1)))
        log_prob, rank = zip(*found, strict=True)
        return Answers(log_prob=torch.cat(log_prob), rank=torch.cat(rank))

    @full_precision()
    def ranks(self, vectors: Float[Tensor, "row d_model"], target: Target) -> Int[Tensor, " row"]:
        """The target's place among all tokens by how much each vector raises their logits, from 1.

        This is the linear part of the read-out, as in ``project``, and a place no scale of the
        norm changes. Ties count against the target: a vector of zeros puts it last. Cost: one pass
        over the unembedding; peak memory: the budget.

        Raises:
            InputError: Of anything but one token, which alone has a place among tokens.
        """
        if target.against is not None:
            raise InputError(
                "a contrast has no rank among the tokens; attribute the prompt without against"
            )
        if not target.is_token:
            raise InputError(
                f"only one token has a rank among the tokens, not {target.words}; attribute the "
                "prompt with one token as target"
            )
        parts = [torch.zeros(0, dtype=torch.long, device=vectors.device)]
        for rows in vectors.split(self.rows_per_block):
            added = self._weighted(self._centred(rows))
            own = added @ self.W_U[:, target.id].to(self.dtype)
            places = torch.ones(len(rows), dtype=torch.long, device=rows.device)
            for columns in self._vocabulary():
                logits = self._product(added, columns)
                if columns.start <= target.id < columns.stop:
                    # the same number from another product may round to another
                    logits[:, target.id - columns.start] = -torch.inf
                places += (logits >= own[:, None]).sum(-1)
            parts.append(places)
        return torch.cat(parts)

    def directions(
        self, tokens: Int[Tensor, " token"], norm_scale: Float[Tensor, ""]
    ) -> Float[Tensor, "token d_model"]:
        """Vectors whose dot product with a contribution is its change of each token's logit."""
        return self._transposed(self._columns(tokens), norm_scale[None])

    def baseline(
        self, resid: Float[Tensor, "base d_model"], target: Target, *, tangent: bool = True
    ) -> "Baseline":
        """The predictions before anything is added, to measure what additions change.

        Cost: one pass over the unembedding, whatever the number of bases; base x d_vocab floats,
        kept. A contrast costs nothing. Without ``tangent`` there are no bounds.
        """
        return baseline_of_runs([self], [resid], [0], [target], tangent=tangent)

    @full_precision()
    def increase(
        self,
        baseline: "Baseline",
        which: Int[Tensor, " row"],
        contributions: Float[Tensor, "row d_model"],
    ) -> Float[Tensor, " row"]:
        """Gain in log p(target), in nats, from adding each contribution to base ``which``.

        With a frozen norm this is ``delta_w - log E_p[exp(delta)]``, where ``delta`` are the
        logits of the contribution alone and ``p`` the base's prediction: rounding errors stay in
        proportion to the contribution, however large the logits of the base are. The scale of
        the norm, and the target, are those of the base. With the norm recomputed it is the
        difference of two log-probabilities, which rounds as they do.
        """
        parts = []
        size = self.rows_per_block
        for rows, bases in zip(contributions.split(size), which.split(size), strict=True):
            aims = baseline.aims[bases]
            if baseline.norm_scale is None:
                after = self._log_prob(baseline.resid[bases] + rows, aims)
                parts.append(after - baseline.log_prob[bases])
                continue
            added = self._weighted(self._centred(rows) / baseline.norm_scale[bases, None])
            moved = self._cap_from(baseline, bases)
            target_delta = self._target_delta(added, baseline, bases, moved)
            if aims.against is not None:
                against_delta = (added * self._columns(aims.against)).sum(-1)
                parts.append(target_delta - moved(against_delta, aims.against))
                continue
            assert baseline.log_probs is not None
            predictions = baseline.prediction[bases]
            expected = self._log_expected(added, baseline.log_probs, predictions, moved)
            parts.append(target_delta - expected)
        return torch.cat(parts) if parts else contributions.new_zeros(0, dtype=self.dtype)

    @full_precision()
    def increase_of_multiples(
        self,
        baseline: "Baseline",
        which: Int[Tensor, " neuron"],
        multiples: Float[Tensor, " neuron"],
        rows: Float[Tensor, "row d_model"],
        row_of: Int[Tensor, " neuron"],
    ) -> Float[Tensor, " neuron"]:
        """``increase`` from adding ``multiples[i] * rows[row_of[i]]`` to base ``which[i]``.

        Neurons of one row, of several source positions or prompts, share its product with the
        unembedding. Cost: a product a row, and a pass over the vocabulary's entries a neuron.
        """
        size = self.rows_per_block
        some = [slice(first, first + size) for first in range(0, len(which), size)]
        alone = len(rows) > size or len(rows) * _SHARED_ROW_BY > len(which) or not self.affine
        if alone or baseline.norm_scale is None or baseline.log_probs is None:
            parts = [rows.new_zeros(0, dtype=self.dtype)]
            for here in some:
                vectors = multiples[here, None] * rows[row_of[here]]
                parts.append(self.increase(baseline, which[here], vectors))
            return torch.cat(parts)
        added = self._weighted(self._centred(rows))
        scaled = multiples / baseline.norm_scale[which]
        total = torch.zeros_like(scaled)
        for columns in self._vocabulary():
            products = self._product(added, columns)
            for here in some:
                delta = products[row_of[here]].mul_(scaled[here, None])
                predictions = baseline.prediction[which[here]]
                joint = _plus_log_probs(delta, baseline.log_probs[:, columns], predictions)
                total[here] += joint.exp_().sum(-1)
        raised = torch.cat(
            [
                self._target_delta(
                    added[row_of[here]],
                    baseline,
                    which[here],
                    lambda delta, tokens, times=scaled[here]: delta * times,
                )
                for here in some
            ]
        )
        increase = raised - total.log()
        (lossy,) = (~_sums_plainly(total)).nonzero(as_tuple=True)
        for here in lossy.split(size):
            vectors = multiples[here, None] * rows[row_of[here]]
            increase[here] = self.increase(baseline, which[here], vectors)
        return increase

    @full_precision()
    def rivals(self, resid: Float[Tensor, " d_model"], target: Target, count: int) -> "Rivals":
        """The target beside the ``count`` likeliest other tokens, and all others as one.

        Of a contrast, the two tokens of it. The norm's scale is that of ``resid``. Cost: two
        passes over the unembedding, for one vector.

        Raises:
            InputError: Of several accepted answers, or a distribution.
        """
        if not target.is_token and target.against is None:
            raise InputError(
                f"only a token or a contrast has rivals, not {target.words}; attribute the prompt "
                "with one token as target"
            )
        centred = self._centred(resid)
        one = centred.new_ones(1)
        slopes = None if self.soft_cap is None else self._cap_slopes(self.logits(resid))
        if target.against is not None:
            tokens = torch.tensor([target.id, target.against.id], device=resid.device)
            columns = self._columns(tokens)
            columns = columns if slopes is None else columns * slopes[tokens, None]
            directions = self._transposed(columns, one)
            prob = torch.tensor([0.0, 1.0], dtype=torch.float64, device=resid.device)
        else:
            # in float64: what the target leaves to others may be very little
            left = self.logits(resid).double().softmax(-1)
            own = left[target.id].clone()
            left[target.id] = -1.0  # below all others
            chosen = left.topk(min(count, len(left) - 1)).indices
            tokens = torch.cat([chosen.new_tensor([target.id]), chosen])
            prob = torch.cat([own[None], left[chosen]])
            left[tokens] = 0.0
            total = left.sum()
            weights = (left / total.clamp(min=torch.finfo(left.dtype).tiny)).to(self.dtype)
            weights = weights if slopes is None else weights * slopes
            mean = torch.zeros_like(centred)
            for some in self._vocabulary():
                mean += self.W_U[:, some].to(self.dtype) @ weights[some]
            columns = self._columns(tokens)
            columns = columns if slopes is None else columns * slopes[tokens, None]
            directions = self._transposed(torch.cat([columns, mean[None]]), one)
            prob = torch.cat([prob, total[None]])
        return Rivals(
            directions=directions,
            prob=prob,
            resid=centred,
            norm_scale=(centred.pow(2).mean() + self.eps).sqrt(),
            centered=self.centered,
            eps=self.eps,
        )

    @full_precision()
    def deviations(self, baseline: "Baseline") -> "Deviations":
        """How far tokens' directions lie from the one each base expects.

        By Cauchy-Schwarz they bound by how much any contribution, known by its norm alone, moves
        the logits apart. Cost: one pass over the unembedding, whatever the number of bases.

        Raises:
            InputError: If the norm is recomputed: directions then depend on what is added.
        """
        tangent, scales = baseline.tangent, baseline.norm_scale
        if tangent is None or scales is None or baseline.log_probs is None:
            raise InputError("only a token's log-probability, its norm frozen, has deviations")
        one = scales.new_ones(1)
        expected = tangent.expected * scales[:, None]
        sizes = expected.square().sum(-1, keepdim=True)
        largest = torch.zeros_like(scales)
        mean = torch.zeros_like(scales)
        widest, longest = scales.new_zeros(()), scales.new_zeros(())
        for columns in self._vocabulary(_SURVEY_COLUMNS):
            wide = self.W_U[:, columns].to(self.dtype)
            widest = torch.maximum(widest, torch.linalg.vector_norm(wide, dim=0).amax())
            directions = self._transposed(wide.T, one)
            squares = directions.square().sum(-1)
            apart = (squares - 2 * expected @ directions.T + sizes).clamp(min=0)
            largest = torch.maximum(largest, apart.amax(-1))
            weights = baseline.log_probs[:, columns].exp()[baseline.prediction]
            mean += (weights * apart).sum(-1)
            longest = torch.maximum(longest, squares.amax())
        # what may have rounded where large squares cancelled
        rounded = 32 * self.W_U.shape[0] ** 0.5 * torch.finfo(self.dtype).eps * longest
        return Deviations(
            largest=(largest + rounded).sqrt() / scales,
            mean_square=(mean + rounded) / scales.square(),
            widest=float(widest),
        )

    def _log_prob(self, rows: Float[Tensor, "row d_model"], aims: "Aims") -> Float[Tensor, " row"]:
        parts = [rows.new_zeros(0, dtype=self.dtype)]
        size = self.rows_per_block
        for first in range(0, len(rows), size):
            normalized = self.normalize(rows[first : first + size])
            aim = aims[slice(first, first + size)]
            if aim.against is not None:
                apart = self._token_logit(normalized, aim.token)
                parts.append(apart - self._token_logit(normalized, aim.against))
                continue
            # the logsumexp of the blocks' logsumexps is the logsumexp over the vocabulary
            partial = [
                self._logit_block(normalized, columns).logsumexp(-1)
                for columns in self._vocabulary()
            ]
            target_logit = self._target_logit(normalized, aim)
            parts.append(target_logit - torch.stack(partial).logsumexp(0))
        return torch.cat(parts)

    def _aims(
        self, targets: Sequence[Target], repeats: Sequence[int], device: torch.device
    ) -> "Aims":
        """So many rows for each target in turn.

        Raises:
            InputError: If they are not of one form; if the model's own distribution is asked about
                without the run that tells it.
        """
        if len({target.form for target in targets}) > 1:
            raise InputError(
                "tokens and contrasts cannot share a baseline, nor targets of other forms, or of "
                "more accepted answers; ask for each in turn"
            )
        number = torch.repeat_interleave(torch.tensor(repeats, device=device))

        def column(ids: list[int]) -> Tensor:
            return torch.tensor(ids, device=device)[number]

        others = [target.against.id for target in targets if target.against is not None]
        also = [[each.id for each in target.also] for target in targets if target.also]
        wanted = [target.distribution for target in targets if target.distribution is not None]
        return Aims(
            token=column([target.id for target in targets]),
            against=column(others) if others else None,
            also=torch.tensor(also, device=device)[number] if also else None,
            wanted=self._wanted(wanted, device)[number] if wanted else None,
        )

    def _wanted(self, distributions: Sequence[Distribution], device: torch.device) -> "Wanted":
        """What each distribution expects of logits. Cost: one pass over the unembedding."""
        if self.soft_cap is not None:
            raise InputError(
                "a distribution cannot be explained where logits pass through a soft cap; give a "
                "token as target"
            )
        given = [each.probs for each in distributions if each.probs is not None]
        if len(given) < len(distributions):
            raise InputError(
                "the model's own prediction is known only after its run; attribute(...) puts it "
                "in, or give Distribution(probs)"
            )
        probs = torch.stack(list(given)).to(device, self.dtype)
        column = probs.new_zeros(len(given), self.W_U.shape[0])
        norm = probs.new_zeros(len(given))
        for columns in self._vocabulary(_SURVEY_COLUMNS):
            column += probs[:, columns] @ self.W_U[:, columns].to(self.dtype).T
            norm += probs[:, columns] @ self._norms(columns)
        constant = -torch.xlogy(probs, probs).sum(-1)
        if self.b_U is not None:
            constant = constant + probs @ self.b_U.to(device, self.dtype)
        return Wanted(column=column, constant=constant, norm=norm)

    def _target_logit(self, normalized: Tensor, aims: "Aims") -> Float[Tensor, " row"]:
        """That of the target, to take the logsumexp of all logits from; not of a contrast."""
        if aims.wanted is not None:
            return (normalized * aims.wanted.column).sum(-1) + aims.wanted.constant
        if aims.also is None:
            return self._token_logit(normalized, aims.token)
        each = [self._token_logit(normalized, tokens) for tokens in aims.answers]
        return torch.stack(each).logsumexp(0)

    def _target_delta(
        self, added: Tensor, baseline: "Baseline", bases: Tensor, moved: _Moved
    ) -> Float[Tensor, " row"]:
        """By how much each row changes its base's target logit; of a contrast the first one.

        Of accepted answers it is the log of the mean of their factors, each weighted by its share
        of the answers' probability before.
        """
        aims = baseline.aims[bases]
        if aims.wanted is not None:  # affine: there is no soft cap
            return moved((added * aims.wanted.column).sum(-1), aims.token)
        if aims.also is None:
            return moved((added * self._columns(aims.token)).sum(-1), aims.token)
        assert baseline.log_share is not None
        each = [moved((added * self._columns(ids)).sum(-1), ids) for ids in aims.answers]
        return joint_rise(torch.stack(each), baseline.log_share[bases].T)

    def _log_expected(
        self,
        added: Float[Tensor, "row d_model"],
        log_probs: Float[Tensor, "prediction d_vocab"],
        which: Int[Tensor, " row"],
        moved: _Moved,
    ) -> Float[Tensor, " row"]:
        """``log E_p[exp(delta)]``: delta each row's logits, p the prediction ``which`` of its own.

        Takes the plain sum of exponentials where that neither overflows nor loses anything, which
        nearly always is so: a logsumexp goes over its block twice more, to find the largest first.
        ``moved`` says what a soft cap makes of the changes.
        """

        def joint(columns: slice) -> Float[Tensor, "row column"]:
            delta = self._product(added, columns)
            return _plus_log_probs(moved(delta, columns), log_probs[:, columns], which)

        total = added.new_zeros(len(added))
        for columns in self._vocabulary():
            total += joint(columns).exp_().sum(-1)
        if bool(_sums_plainly(total).all()):
            return total.log()
        partial = [joint(columns).logsumexp(-1) for columns in self._vocabulary()]
        return torch.stack(partial).logsumexp(0)

    def _cap_from(self, baseline: "Baseline", bases: Int[Tensor, " row"]) -> _Moved:
        """What a soft cap makes of changes of logits: it depends on where each base is on it.

        Of a token of each row's own, or of all tokens of a block.
        """
        if self.soft_cap is None:
            return lambda delta, tokens: delta
        assert baseline.norm_scale is not None
        here, place = bases.unique(return_inverse=True)
        start = self.normalize(
            self._at_scale(baseline.resid[here], baseline.norm_scale[here, None])
        )

        def moved(delta: Tensor, tokens: Tensor | slice) -> Tensor:
            if isinstance(tokens, slice):
                return self._moved(delta, self._uncapped_block(start, tokens)[place])
            return self._moved(delta, self._uncapped(start[place], tokens))

        return moved

    def _survey(
        self, normalized: Float[Tensor, "row d_model"], leaning: Bool[Tensor, " row"]
    ) -> "_Survey":
        """One pass over the unembedding: predictions, and what they expect of a contribution.

        The expectations are taken with weights that are rescaled whenever a larger logit turns
        up, so that the unembedding need not be read a second time for their normaliser. They are
        of the ``leaning`` rows only (0 for the others). Under a soft cap each column counts by the
        slope of the cap there.
        """
        n_rows, d_model = normalized.shape
        log_probs = normalized.new_empty(n_rows, self.W_U.shape[1])
        some = leaning.nonzero()[:, 0]
        leans = len(some) > 0
        expected = normalized.new_zeros(len(some), d_model)
        expected_norm = normalized.new_zeros(len(some))
        expected_square = normalized.new_zeros(len(some))
        total = normalized.new_zeros(n_rows)
        largest = normalized.new_full((n_rows,), torch.finfo(self.dtype).min)
        for columns in self._vocabulary(_SURVEY_COLUMNS):
            directions = self.W_U[:, columns].to(self.dtype)
            logits = normalized @ directions
            if self.b_U is not None:
                logits += self.b_U[columns].to(self.dtype)
            logits = self._capped(logits)
            log_probs[:, columns] = logits
            slopes = self._cap_slopes(logits)
            seen, largest = largest, torch.maximum(largest, logits.amax(-1))
            shrink = (seen - largest).exp()
            weights = (logits - largest[:, None]).exp_()
            total = total * shrink + weights.sum(-1)
            if leans:
                weights, shrink = weights[some], shrink[some]
                norms = self._norms(columns)
                expected_norm = expected_norm * shrink + weights @ norms
                if slopes is not None:
                    expected_square = expected_square * shrink + weights @ norms.square()
                    weights = weights * slopes[some]
                # rows first: the other way round the product took twice the time (24 rows, 2 cores)
                expected = torch.addmm(expected * shrink[:, None], weights, directions.T)
        # one after the other: their sum would round, by the same amount for all tokens
        log_probs -= largest[:, None]
        log_probs -= total.log()[:, None]
        found = _Survey(
            log_probs,
            largest + total.log(),
            normalized.new_zeros(n_rows, d_model),
            normalized.new_zeros(n_rows),
            normalized.new_zeros(n_rows),
        )
        found.expected[some] = expected / total[some, None]
        found.expected_norm[some] = expected_norm / total[some]
        found.expected_square[some] = expected_square / total[some]
        return found

    def _norms(self, tokens: slice | Tensor) -> Float[Tensor, " token"]:
        """Norms of these tokens' directions, each entry weighted by the final norm's gain."""
        known = None if self.norms is None else self.norms.of_columns(self.W_U)
        if self.soft_cap is not None:
            known = None  # a bound rests on them there, not on an allowance for rounding alone
        if known is None:
            return column_norms(self.W_U[:, tokens], self.gain).to(self.dtype)
        return known[tokens].to(self.dtype)

    def _transposed(self, vectors: Tensor, norm_scale: Tensor) -> Tensor:
        """The transpose of the frozen norm's linear part, at each row's own scale."""
        return self._centred(self._weighted(vectors) / norm_scale[:, None])

    def _centred(self, vectors: Tensor) -> Tensor:
        vectors = vectors.to(self.dtype)
        return vectors - vectors.mean(-1, keepdim=True) if self.centered else vectors

    def _at_scale(self, resid: Tensor, scale: Tensor) -> Tensor:
        """Vectors of which the frozen norm makes what it would, were it frozen at ``scale``."""
        assert self.norm_scale is not None
        # its linear part: this divides by the other scale instead
        return resid.to(self.dtype) * (self.norm_scale / scale)

    def _weighted(self, vectors: Tensor) -> Tensor:
        return vectors if self.gain is None else vectors * self.gain.to(self.dtype)

    def _columns(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        return self.W_U[:, tokens].T.to(self.dtype)

    def _token_logit(self, normalized: Tensor, tokens: Tensor) -> Tensor:
        return self._capped(self._uncapped(normalized, tokens))

    def _uncapped(self, normalized: Tensor, tokens: Tensor) -> Tensor:
        logit = (normalized * self._columns(tokens)).sum(-1)
        return logit if self.b_U is None else logit + self.b_U[tokens].to(self.dtype)

    def _product(self, normalized: Tensor, columns: slice) -> Tensor:
        return normalized @ self.W_U[:, columns].to(self.dtype)

    def _logit_block(self, normalized: Tensor, columns: slice) -> Tensor:
        return self._capped(self._uncapped_block(normalized, columns))

    def _uncapped_block(self, normalized: Tensor, columns: slice) -> Tensor:
        logits = self._product(normalized, columns)
        return logits if self.b_U is None else logits + self.b_U[columns].to(self.dtype)

    def _capped(self, logits: Tensor) -> Tensor:
        if self.soft_cap is None:
            return logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap)

    def _cap_slopes(self, capped: Tensor) -> Tensor | None:
        """By how much logits, which were capped, move of what they would without the cap."""
        return None if self.soft_cap is None else 1 - (capped / self.soft_cap).square()

    def _moved(self, delta: Tensor, before: Tensor) -> Tensor:
        """By how much capped logits change that without the cap go from ``before`` by ``delta``.

        tanh(a + b) - tanh(a) without a difference where b is small, so that it rounds in
        proportion to ``delta``.
        """
        assert self.soft_cap is not None
        start, step = before / self.soft_cap, delta / self.soft_cap
        a, b = torch.tanh(start), torch.tanh(step)
        small = b / torch.cosh(start).square() / (1 + a * b)
        return self.soft_cap * torch.where(step.abs() < 1, small, torch.tanh(start + step) - a)

    def _vocabulary(self, size: int | None = None) -> Iterator[slice]:
        size = size or _COLUMNS
        for start in range(0, self.W_U.shape[1], size):
            yield slice(start, start + size)


@dataclass(frozen=True)
class _Survey:
    log_probs: Float[Tensor, "row d_vocab"]
    log_total: Float[Tensor, " row"]
    """What was taken from the logits to make log-probabilities of them."""
    expected: Float[Tensor, "row d_model"]
    """The expected column of the unembedding, times the slope of a soft cap."""
    expected_norm: Float[Tensor, " row"]
    """The expected norm of such a column, weighted by the final norm's gain."""
    expected_square: Float[Tensor, " row"]
    """The expected square of that norm; 0 without a soft cap."""


def _plus_log_probs(
    delta: Float[Tensor, "row column"],
    log_probs: Float[Tensor, "prediction column"],
    which: Int[Tensor, " row"],
) -> Float[Tensor, "row column"]:
    """``log p + delta`` in the place of ``delta``; p the prediction ``which`` of each row's own."""
    own, counts = which.unique_consecutive(return_counts=True)
    if len(own) * _SHARED_BY > len(which):
        return delta.add_(log_probs[which])
    # a prediction for many rows in a row: nothing the size of the block is copied
    for place, rows in zip(own.tolist(), delta.split(counts.tolist()), strict=True):
        rows += log_probs[place]
    return delta


def _sums_plainly(total: Float[Tensor, " row"]) -> Bool[Tensor, " row"]:
    """Whether a sum of exponentials has neither overflowed nor lost anything that counts.

    What underflowed is below d_vocab * 1e-38 in all: nothing beside ``_LEAST``.
    """
    return (total > _LEAST) & total.isfinite()


@full_precision()
def baseline_of_runs(
    outs: Sequence[ReadOut],
    resids: Sequence[Float[Tensor, "_ d_model"]],
    run_of: Sequence[int],
    targets: Sequence[Target],
    *,
    tangent: bool = True,
    plain: Sequence[int] = (),
) -> Baseline:
    """The baselines of several runs of one model, asked about one or several targets.

    Run i has the read-out ``outs[i]`` (they differ in the scale of the norm only) and the bases
    ``resids[i]``. Request j asks about ``targets[j]`` in run ``run_of[j]``; its bases follow those
    of request j - 1. ``plain`` are places among each run's bases that need no tangent: theirs
    means nothing.

    Cost: one pass over the unembedding for all of them; d_vocab floats for each base of a run.

    Raises:
        InputError: If targets are not of one form.
    """
    out, device = outs[0], resids[0].device
    counts = [len(resid) for resid in resids]
    aims = out._aims(targets, [counts[run] for run in run_of], device)
    # which base of all runs each base of the result is
    starts = [sum(counts[:run]) for run in range(len(counts))]
    places = [torch.arange(starts[run], starts[run] + counts[run]) for run in run_of]
    source = torch.cat(places).to(device)
    norm_scale = None
    if out.norm_scale is not None:
        scales = [each.norm_scale.item() for each in outs if each.norm_scale is not None]
        lengths = torch.tensor(counts, device=device)
        norm_scale = torch.tensor(scales, dtype=out.dtype, device=device)
        norm_scale = norm_scale.repeat_interleave(lengths)[source]
    normalized = torch.cat([each.normalize(r) for each, r in zip(outs, resids, strict=True)])
    log_probs = log_share = picture = None
    if aims.against is None:
        leaning = torch.full_like(normalized[:, 0], tangent and out.bounded, dtype=torch.bool)
        for start in starts:
            leaning[[start + place for place in plain]] = False
        survey = out._survey(normalized, leaning)
        log_probs = survey.log_probs
        if aims.wanted is None:
            own = [log_probs[source, ids] for ids in aims.answers]
            logits = [each + survey.log_total[source] for each in own]
            log_prob = own[0]
            if len(own) > 1:
                log_prob = torch.stack(own).logsumexp(0)
                log_share = torch.stack(own, 1) - log_prob[:, None]
        else:
            logits = [out._target_logit(normalized[source], aims)]
            log_prob = logits[0] - survey.log_total[source]
        expected, expected_norm = survey.expected[source], survey.expected_norm[source]
        expected_square = survey.expected_square[source]
    else:
        logits = [out._token_logit(normalized[source], aims.token)]
        against_logit = out._token_logit(normalized[source], aims.against)
        log_prob = logits[0] - against_logit
        expected, slopes = out._columns(aims.against), out._cap_slopes(against_logit)
        expected = expected if slopes is None else expected * slopes[:, None]
        expected_norm = out._norms(aims.against)
        expected_square = expected_norm.square()
    if tangent and norm_scale is not None:
        tangents = []
        for ids, logit in zip(aims.answers, logits, strict=True):
            column, own_norm = out._columns(ids), out._norms(ids)
            if aims.wanted is not None:
                column, own_norm = aims.wanted.column, aims.wanted.norm
            slopes = out._cap_slopes(logit)
            column = column if slopes is None else column * slopes[:, None]
            bend = None
            if out.soft_cap is not None:
                squares = (own_norm.square() + expected_square) / norm_scale.square()
                bend = squares * 2 / (3 * 3**0.5 * out.soft_cap)
            tangents.append(
                Tangent(
                    gradient=out._transposed(column - expected, norm_scale),
                    expected=out._transposed(expected, norm_scale),
                    reach=(own_norm + expected_norm) / norm_scale,
                    bend=bend,
                )
            )
        picture = tangents[0] if log_share is None else _of_answers(tangents, log_share)
    return Baseline(
        resid=torch.cat(list(resids))[source],
        aims=aims,
        norm_scale=norm_scale,
        log_prob=log_prob,
        log_probs=log_probs,
        prediction=source,
        log_share=log_share,
        tangent=picture,
    )


def _of_answers(tangents: Sequence[Tangent], log_share: Float[Tensor, "base answer"]) -> Tangent:
    """The tangents of several accepted answers, and that of them together."""
    gradients = torch.stack([each.gradient for each in tangents], 1)
    bends = [each.bend for each in tangents if each.bend is not None]
    return Tangent(
        gradient=(log_share.exp()[..., None] * gradients).sum(1),
        expected=tangents[0].expected,
        reach=torch.stack([each.reach for each in tangents]).amax(0),
        bend=torch.stack(bends).amax(0) if bends else None,
        answers=tuple(tangents),
    )


def read_out(
    host: Host,
    resid_final: Float[Tensor, " d_model"],
    convention: Convention = "exact",
    *,
    budget: int = DEFAULT_BUDGET,
    dtype: torch.dtype | None = None,
) -> ReadOut:
    """The read-out of one run, its norm frozen at the scale of ``resid_final``.

    ``resid_final`` is the residual stream after the last block at the read position
    (``Capture.resid_final``). ``dtype`` is what scores are computed in: by default that of
    ``resid_final``, float32 or wider.

    Source: Yu & Ananiadou (2024), section 3; conventions as in this module's docstring.

    Raises:
        InputError: If ``convention`` is unknown, or ``budget`` too small for one vector.
    """
    dtype = resid_final.dtype if dtype is None else dtype
    check_read_out(host, convention, budget, dtype)
    published = convention == "published"
    rms = host.norm == "rms_norm"
    out = ReadOut(
        W_U=host.W_U,
        b_U=None if published else host.b_U,
        gain=host.final_gain,
        bias=None if published else host.final_bias,
        norm_scale=None,
        centered=not rms,
        eps=_PUBLISHED_RMS_EPS if published and rms else host.eps,
        dtype=dtype,
        budget=budget,
        soft_cap=host.soft_cap,
    )
    if convention == "recomputed":
        return out
    return replace(out, norms=weight_norms(host))._frozen_at(resid_final)


def check_read_out(
    host: Host, convention: str, budget: int, dtype: torch.dtype | None = None
) -> None:
    """Stop before the forward pass if ``read_out`` would fail after it.

    Raises:
        InputError: If ``convention`` is unknown, or if not even one vector could be read out
            within ``budget`` bytes, saying how many are needed.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise InputError(f"scores are computed in torch.float32 or torch.float64, not in {dtype!r}")
    if convention not in CONVENTIONS:
        raise InputError(f"convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}")
    wide = dtype or torch.promote_types(host.dtype, torch.float32)
    _rows_per_block(host.W_U, wide, budget, host.soft_cap is not None)


def _rows_per_block(
    W_U: Float[Tensor, "d_model d_vocab"], dtype: torch.dtype, budget: int, capped: bool
) -> int:
    d_model, d_vocab = W_U.shape
    columns = min(_COLUMNS, d_vocab)
    # one row: its block of logits, what is added to it, and logsumexp's copy; its vector, the
    # normalised one and two temporaries; seven more blocks on the way through a soft cap.
    # Once: a widened block of W_U
    per_row = dtype.itemsize * ((10 if capped else 3) * columns + 4 * d_model)
    once = 0 if W_U.dtype == dtype else dtype.itemsize * columns * d_model
    rows = (budget - once) // per_row
    if rows < 1:
        raise InputError(
            f"a budget of {budget} bytes is too small to read out one vector; "
            f"give at least {once + per_row}"
        )
    return min(_ROWS, rows)
