"""What a read-out makes of residual vectors before anything is added, and how that changes."""

from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.display import brief


@dataclass(frozen=True, kw_only=True)
class Aims:
    """The target of each row, all of one form: tokens, contrasts, answers, distributions."""

    token: Int[Tensor, " row"]
    against: Int[Tensor, " row"] | None
    also: Int[Tensor, "row other"] | None = None
    """Further accepted answers."""
    wanted: "Wanted | None" = None

    @property
    def answers(self) -> list[Int[Tensor, " row"]]:
        """Each row's first accepted answer, its second, and so on."""
        return [self.token, *([] if self.also is None else self.also.unbind(1))]

    def __getitem__(self, rows: slice | Tensor) -> "Aims":
        return Aims(
            token=self.token[rows],
            against=None if self.against is None else self.against[rows],
            also=None if self.also is None else self.also[rows],
            wanted=None if self.wanted is None else self.wanted[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What each row's distribution expects of logits: it takes the place of a token's column."""

    column: Float[Tensor, "row d_model"]
    """Expected column of the unembedding."""
    constant: Float[Tensor, " row"]
    """Expected bias of a logit, and the distribution's entropy, in nats."""
    norm: Float[Tensor, " row"]
    """Expected norm of such a column, weighted by the final norm's gain."""

    def __getitem__(self, rows: slice | Tensor) -> "Wanted":
        return Wanted(column=self.column[rows], constant=self.constant[rows], norm=self.norm[rows])


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Residual vectors that blocks add to, and what the model would predict from each of them.

    The bases may come from several runs and be asked about several targets: each base has a
    target and a norm scale of its own.
    """

    resid: Float[Tensor, "base d_model"]
    aims: Aims
    """The target of each base."""
    norm_scale: Float[Tensor, " base"] | None
    """The frozen norm's divisor; ``None`` if the norm is recomputed."""
    log_prob: Float[Tensor, " base"]
    """log p(target) of each base; of a contrast the difference, of a distribution -KL."""
    log_share: Float[Tensor, "base answer"] | None = None
    """Of several accepted answers the log of each one's share of their probability."""
    log_probs: Float[Tensor, "prediction d_vocab"] | None
    """log p(every token); ``None`` for contrasts, which do not depend on it."""
    prediction: Int[Tensor, " base"]
    """The row of ``log_probs`` that is the base's: bases that differ in their target share one."""
    tangent: "Tangent | None"
    """How log p(target) changes there; ``None`` if the norm is recomputed."""

    __repr__ = brief

    def __len__(self) -> int:
        return self.resid.shape[0]

    def __getitem__(self, bases: slice | Tensor) -> "Baseline":
        """The same for some of the bases."""
        return replace(
            self,
            resid=self.resid[bases],
            aims=self.aims[bases],
            norm_scale=None if self.norm_scale is None else self.norm_scale[bases],
            log_prob=self.log_prob[bases],
            prediction=self.prediction[bases],
            log_share=None if self.log_share is None else self.log_share[bases],
            tangent=None if self.tangent is None else self.tangent[bases],
        )


@dataclass(frozen=True, kw_only=True)
class Tangent:
    """The first-order picture of log p(target) at each base, for a frozen norm.

    As log p is concave in the residual vector, ``contribution . gradient`` is never below the
    exact ``increase``: an upper bound of a neuron's score for one dot product. So it is for a
    distribution, whose expected logit is affine as a token's is. For a contrast it *is* the
    increase.

    Of several accepted answers log p is not concave, but each of them has its tangent, and with the
    answers' shares s of their probability::

        increase = log sum_w s_w exp(increase of w) <= log sum_w s_w exp(u . gradient of w)

    Under a soft cap log p is not concave, but its logits bend by so little that the tangent need
    only be raised: ``z -> c tanh(z / c)`` has a second derivative of at most ``4 / (3 sqrt(3) c)``,
    so that a logit that moves by d without the cap moves by ``slope d`` with it, give or take half
    of that times d^2. log p(w) is then never above ``contribution . gradient`` and the allowances
    for w and, as expected under the base's prediction, for its rivals (Jensen's inequality)::

        increase <= u . gradient + bend |u|^2,    bend = (|dir_w|^2 + E |dir|^2) 2 / (3 sqrt(3) c)
    """

    gradient: Float[Tensor, "base d_model"]
    """Of log p(target); of several accepted answers no bound by itself."""
    expected: Float[Tensor, "base d_model"]
    """What the base's prediction expects of tokens' directions."""
    reach: Float[Tensor, " base"]
    """Norm of the target's direction, and expected norm of a token's under the base's prediction,
    before centring: what the rounding of scores and bounds is in proportion to, where gradients
    cancel too."""
    bend: Float[Tensor, " base"] | None
    """Nats per squared norm of a contribution; ``None`` without a soft cap: 0."""
    answers: "tuple[Tangent, ...]" = ()
    """That of each of several accepted answers."""

    __repr__ = brief

    def __getitem__(self, bases: slice | Tensor) -> "Tangent":
        """The same for some of the bases."""
        return Tangent(
            answers=tuple(each[bases] for each in self.answers),
            gradient=self.gradient[bases],
            expected=self.expected[bases],
            reach=self.reach[bases],
            bend=None if self.bend is None else self.bend[bases],
        )


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What is made of one token by each of several residual vectors."""

    log_prob: Float[Tensor, " row"]
    """log p(token), in nats."""
    rank: Int[Tensor, " row"]
    """Its place among all tokens, from 1: how many are likelier, and one."""


@dataclass(frozen=True, kw_only=True)
class Deviations:
    """How far tokens' directions lie from the one each base expects; never below the truth.

    A direction's dot product with a contribution is its change of the token's logit.
    """

    largest: Float[Tensor, " base"]
    """Distance of the farthest token."""
    mean_square: Float[Tensor, " base"]
    """Expected square of the distance, under the base's prediction."""
    widest: float
    """Largest norm of a column of the unembedding."""


def joint_rise(
    rises: Float[Tensor, "answer row"], log_share: Float[Tensor, "answer _"]
) -> Float[Tensor, " row"]:
    """Rise in the log of several answers' summed probability, of which each log p rises so much.

    ``log_share`` is the log of each one's share of it before. It grows with every answer's rise.
    """
    return (rises + log_share).logsumexp(0)
