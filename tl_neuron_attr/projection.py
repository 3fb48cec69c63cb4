"""What a vector says: the tokens it raises most, and those it lowers most."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.display import brief
from tl_neuron_attr.readout import ReadOut


@dataclass(frozen=True, kw_only=True)
class TokenEnds:
    """Both ends of each vector's projection on the vocabulary, strongest first."""

    top_ids: Int[Tensor, "*batch k"]
    top_logits: Float[Tensor, "*batch k"]
    """Logit change the vector brings to each of these tokens."""
    bottom_ids: Int[Tensor, "*batch k"]
    bottom_logits: Float[Tensor, "*batch k"]
    mean: Float[Tensor, "*batch"]
    """Mean logit over the vocabulary, all tokens alike."""
    spread: Float[Tensor, "*batch"]
    """Standard deviation of the logits over the vocabulary."""

    __repr__ = brief

    @property
    def readability(self) -> Float[Tensor, "*batch"]:
        """How far the stronger end stands out: its distance from the mean, in standard deviations.

        Neither the size nor the sign of a vector changes it. Logits spread like a Gaussian give
        about ``sqrt(2 log d_vocab)``: 4 at 2,000 tokens, 4.6 at 50,000; one token alone gives
        ``sqrt(d_vocab - 1)``. 0 for a vector that moves all tokens alike.
        """
        ends = self.top_logits[..., 0] - self.mean, self.mean - self.bottom_logits[..., 0]
        stronger = torch.maximum(*ends)
        return torch.where(self.spread > 0, stronger / self.spread, 0.0)


def project(out: ReadOut, vectors: Float[Tensor, "*batch d_model"], k: int = 10) -> TokenEnds:
    """The ``k`` tokens each vector raises most and the ``k`` it lowers most.

    This is the linear part of the read-out: no bias of norm or unembedding, for those belong to
    no vector. For a bare subvalue mind the sign rule: with a negative coefficient the neuron
    raises the *bottom* tokens. A vector that carries its coefficient already raises its top.
    Under ``recomputed`` there is no linear part, and vectors are projected without a scale.

    Source: Yu & Ananiadou (2024), section 3; sign rule: their section 4.
    """
    vectors = vectors.to(out.W_U.device)
    scale = torch.ones((), dtype=out.dtype) if out.norm_scale is None else out.norm_scale
    linear = replace(out, bias=None, b_U=None, norm_scale=scale.to(vectors.device), soft_cap=None)
    rows = vectors.reshape(-1, vectors.shape[-1])
    k = min(k, out.W_U.shape[1])
    top_logits, top_ids, bottom_logits, bottom_ids, mean, spread = [], [], [], [], [], []
    for block in rows.split(linear.whole_rows):
        logits = linear.logits(block)
        values, ids = logits.topk(k, dim=-1)
        top_logits.append(values)
        top_ids.append(ids)
        values, ids = logits.topk(k, dim=-1, largest=False)
        bottom_logits.append(values)
        bottom_ids.append(ids)
        mean.append(logits.mean(-1))
        apart = logits.sub_(mean[-1][:, None])
        spread.append(torch.linalg.vector_norm(apart, dim=-1) / apart.shape[-1] ** 0.5)
    shape = (*vectors.shape[:-1], k)
    return TokenEnds(
        top_ids=torch.cat(top_ids).reshape(shape),
        top_logits=torch.cat(top_logits).reshape(shape),
        bottom_ids=torch.cat(bottom_ids).reshape(shape),
        bottom_logits=torch.cat(bottom_logits).reshape(shape),
        mean=torch.cat(mean).reshape(shape[:-1]),
        spread=torch.cat(spread).reshape(shape[:-1]),
    )
