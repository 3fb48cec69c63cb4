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
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host

Convention = Literal["exact", "published", "recomputed"]
"""How a residual vector is read out as a log-probability: see this module's docstring."""

CONVENTIONS: tuple[Convention, ...] = ("exact", "published", "recomputed")

DEFAULT_BUDGET = 2**30
"""Bytes a read-out may use for its working set, beyond its arguments and its result."""

# One block of logits is this many rows by this many vocabulary entries: 8 MiB in float32, which
# stays in cache between the matrix product and the logsumexp (measured 1.6 x faster than
# whole-vocabulary rows at GPT-2-small shape on 2 cores).
_ROWS, _COLUMNS = 512, 4096

_PUBLISHED_RMS_EPS = 1e-6


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

    @property
    def affine(self) -> bool:
        """Whether logits are affine in the residual vector, as bounds on scores require."""
        return self.norm_scale is not None

    @property
    def rows_per_block(self) -> int:
        """How many vectors are read out at a time within the budget."""
        return _rows_per_block(self.W_U, self.dtype, self.budget)

    def linear(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The frozen norm's linear part: what adding a vector adds to the final norm's output.

        Raises:
            InputError: If the norm is recomputed, for then it has no linear part.
        """
        if self.norm_scale is None:
            raise InputError("a recomputed norm has no linear part; use exact or published")
        vectors = vectors.to(self.dtype)
        if self.centered:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        vectors = vectors / self.norm_scale
        return vectors if self.gain is None else vectors * self.gain.to(self.dtype)

    def normalize(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The final norm's output for each residual vector."""
        if self.norm_scale is not None:
            normalized = self.linear(resid)
        else:
            resid = resid.to(self.dtype)
            if self.centered:
                resid = resid - resid.mean(-1, keepdim=True)
            scale = (resid.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
            normalized = resid / scale
            if self.gain is not None:
                normalized = normalized * self.gain.to(self.dtype)
        return normalized if self.bias is None else normalized + self.bias.to(self.dtype)

    def logits(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """All logits of each residual vector. Cost: batch x d_vocab floats of memory."""
        normalized = self.normalize(resid)
        blocks = [self._logit_block(normalized, columns) for columns in self._vocabulary()]
        return torch.cat(blocks, dim=-1)

    def log_prob(
        self, resid: Float[Tensor, "*batch d_model"], token: int
    ) -> Float[Tensor, "*batch"]:
        """log p(token | resid) of each residual vector, in nats, within the budget."""
        rows = resid.reshape(-1, resid.shape[-1])
        parts = []
        for block in rows.split(self.rows_per_block):
            normalized = self.normalize(block)
            token_logit = self._logit_block(normalized, slice(token, token + 1))[:, 0]
            # the logsumexp of the blocks' logsumexps is the logsumexp over the vocabulary
            partial = [
                self._logit_block(normalized, columns).logsumexp(-1)
                for columns in self._vocabulary()
            ]
            parts.append(token_logit - torch.stack(partial).logsumexp(0))
        return torch.cat(parts).reshape(resid.shape[:-1])

    def baseline(self, resid: Float[Tensor, "base d_model"], token: int) -> "Baseline":
        """The predictions before anything is added, to measure what additions change.

        Cost: two passes over the unembedding (one if the norm is recomputed), whatever the
        number of bases; base x d_vocab floats, kept.
        """
        log_probs = self.logits(resid).log_softmax(-1)
        tangent = None
        if self.norm_scale is not None:
            tangent = self._tangent(log_probs, token, self.norm_scale)
        return Baseline(resid=resid, token=token, log_probs=log_probs, tangent=tangent)

    def increase(
        self,
        baseline: "Baseline",
        which: Int[Tensor, " row"],
        contributions: Float[Tensor, "row d_model"],
    ) -> Float[Tensor, " row"]:
        """Gain in log p(token), in nats, from adding each contribution to base ``which``.

        With a frozen norm this is ``delta_w - log E_p[exp(delta)]``, where ``delta`` are the
        logits of the contribution alone and ``p`` the base's prediction: rounding errors stay in
        proportion to the contribution, however large the logits of the base are.
        """
        token, parts = baseline.token, []
        size = self.rows_per_block
        for rows, bases in zip(contributions.split(size), which.split(size), strict=True):
            if not self.affine:
                after = self.log_prob(baseline.resid[bases] + rows, token)
                parts.append(after - baseline.log_probs[bases, token])
                continue
            added = self.linear(rows)
            partial = []
            for columns in self._vocabulary():
                before = baseline.log_probs[:, columns]
                delta = self._product(added, columns)
                # one base serves all rows by broadcasting
                delta += before if before.shape[0] == 1 else before[bases]
                partial.append(delta.logsumexp(-1))
            token_delta = self._product(added, slice(token, token + 1))[:, 0]
            parts.append(token_delta - torch.stack(partial).logsumexp(0))
        return torch.cat(parts) if parts else contributions.new_zeros(0, dtype=self.dtype)

    def _tangent(
        self, log_probs: Float[Tensor, "base d_vocab"], token: int, norm_scale: Float[Tensor, ""]
    ) -> "Tangent":
        probs = log_probs.exp()
        expected = probs.new_zeros(log_probs.shape[0], self.W_U.shape[0])
        norms = []
        for columns in self._vocabulary():
            directions = self.W_U[:, columns].to(self.dtype)
            expected += probs[:, columns] @ directions.T
            weighted = directions if self.gain is None else directions * self.gain[:, None]
            norms.append(torch.linalg.vector_norm(weighted, dim=0))
        reach = probs @ torch.cat(norms) / norm_scale
        direction = self._direction(token)
        return Tangent(
            gradient=direction - self._linear_transposed(expected),
            reach=reach + direction.norm(),
        )

    def _direction(self, token: int) -> Float[Tensor, " d_model"]:
        """The vector whose dot product with a contribution is the token's logit change."""
        return self._linear_transposed(self.W_U[:, token].to(self.dtype))

    def _linear_transposed(self, vectors: Tensor) -> Tensor:
        if self.norm_scale is None:
            raise InputError("a recomputed norm has no linear part; use exact or published")
        if self.gain is not None:
            vectors = vectors * self.gain.to(self.dtype)
        vectors = vectors / self.norm_scale
        return vectors - vectors.mean(-1, keepdim=True) if self.centered else vectors

    def _product(self, normalized: Tensor, columns: slice) -> Tensor:
        return normalized @ self.W_U[:, columns].to(self.dtype)

    def _logit_block(self, normalized: Tensor, columns: slice) -> Tensor:
        logits = self._product(normalized, columns)
        return logits if self.b_U is None else logits + self.b_U[columns].to(self.dtype)

    def _vocabulary(self) -> Iterator[slice]:
        for start in range(0, self.W_U.shape[1], _COLUMNS):
            yield slice(start, start + _COLUMNS)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Residual vectors that blocks add to, and what the model would predict from each of them."""

    resid: Float[Tensor, "base d_model"]
    token: int
    """The target."""
    log_probs: Float[Tensor, "base d_vocab"]
    tangent: "Tangent | None"
    """How log p(token) changes there; ``None`` if the norm is recomputed."""

    def __getitem__(self, bases: slice) -> "Baseline":
        """The same for some of the bases."""
        return replace(
            self,
            resid=self.resid[bases],
            log_probs=self.log_probs[bases],
            tangent=None if self.tangent is None else self.tangent[bases],
        )


@dataclass(frozen=True, kw_only=True)
class Tangent:
    """The first-order picture of log p(token) at each base, for a frozen norm.

    As log p is concave in the residual vector, ``contribution . gradient`` is never below the
    exact ``increase``: an upper bound of a neuron's score for one dot product.
    """

    gradient: Float[Tensor, "base d_model"]
    reach: Float[Tensor, " base"]
    """Norm of the target's direction, and expected norm of a token's under the base's prediction:
    what the rounding of scores and bounds is in proportion to, where gradients cancel too."""

    def __getitem__(self, bases: slice) -> "Tangent":
        """The same for some of the bases."""
        return Tangent(gradient=self.gradient[bases], reach=self.reach[bases])


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
    )
    if convention == "recomputed":
        return out
    resid = resid_final.to(dtype)
    if out.centered:
        resid = resid - resid.mean()
    return replace(out, norm_scale=(resid.pow(2).mean() + out.eps).sqrt())


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
    _rows_per_block(host.W_U, dtype or torch.promote_types(host.dtype, torch.float32), budget)


def _rows_per_block(W_U: Float[Tensor, "d_model d_vocab"], dtype: torch.dtype, budget: int) -> int:
    d_model, d_vocab = W_U.shape
    columns = min(_COLUMNS, d_vocab)
    # one row: its block of logits, what is added to it, and logsumexp's copy; its vector, the
    # normalised one and two temporaries. Once: a widened block of W_U
    per_row = dtype.itemsize * (3 * columns + 4 * d_model)
    once = 0 if W_U.dtype == dtype else dtype.itemsize * columns * d_model
    rows = (budget - once) // per_row
    if rows < 1:
        raise InputError(
            f"a budget of {budget} bytes is too small to read out one vector; "
            f"give at least {once + per_row}"
        )
    return min(_ROWS, rows)


# --- what a vector says -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TokenEnds:
    """Both ends of each vector's projection on the vocabulary, strongest first."""

    top_ids: Int[Tensor, "*batch k"]
    top_logits: Float[Tensor, "*batch k"]
    """Logit change the vector brings to each of these tokens."""
    bottom_ids: Int[Tensor, "*batch k"]
    bottom_logits: Float[Tensor, "*batch k"]


def project(out: ReadOut, vectors: Float[Tensor, "*batch d_model"], k: int = 10) -> TokenEnds:
    """The ``k`` tokens each vector raises most and the ``k`` it lowers most.

    This is the linear part of the read-out: no bias of norm or unembedding, for those belong to
    no vector. For a bare subvalue mind the sign rule: with a negative coefficient the neuron
    raises the *bottom* tokens. A vector that carries its coefficient already raises its top.
    Under ``recomputed`` there is no linear part, and vectors are projected without a scale.

    Source: Yu & Ananiadou (2024), section 3; sign rule: their section 4.
    """
    scale = torch.ones((), dtype=out.dtype) if out.norm_scale is None else out.norm_scale
    linear = replace(out, bias=None, b_U=None, norm_scale=scale.to(vectors.device))
    rows = vectors.reshape(-1, vectors.shape[-1])
    k = min(k, out.W_U.shape[1])
    top_logits, top_ids, bottom_logits, bottom_ids = [], [], [], []
    per_block = max(1, linear.rows_per_block * _COLUMNS // max(out.W_U.shape[1], _COLUMNS))
    for block in rows.split(per_block):
        logits = linear.logits(block)
        values, ids = logits.topk(k, dim=-1)
        top_logits.append(values)
        top_ids.append(ids)
        values, ids = logits.topk(k, dim=-1, largest=False)
        bottom_logits.append(values)
        bottom_ids.append(ids)
    shape = (*vectors.shape[:-1], k)
    return TokenEnds(
        top_ids=torch.cat(top_ids).reshape(shape),
        top_logits=torch.cat(top_logits).reshape(shape),
        bottom_ids=torch.cat(bottom_ids).reshape(shape),
        bottom_logits=torch.cat(bottom_logits).reshape(shape),
    )
