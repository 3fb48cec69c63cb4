"""A target and the tokens it competes with: how log p bends as something is taken away."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.pieces import Matrix
from tl_neuron_attr.precision import full_precision

_ROWS = 512  # of a weight matrix, that are multiplied at a time


@dataclass(frozen=True, kw_only=True)
class Rivals:
    """The target and what it competes with: how log p(target) bends as something is taken away.

    Bins are the target, then its likeliest rivals, then all other tokens as one that lies where
    they lie on average. For a contrast the two tokens alone, the second of which has it all.
    """

    directions: Float[Tensor, "bin d_model"]
    """A normalised vector's dot product with it is its change of the bin's logit."""
    prob: Float[Tensor, " bin"]
    """What the model gives each bin, in float64; of a contrast 0 and 1."""
    resid: Float[Tensor, " d_model"]
    """The final residual, its mean taken out where the norm does."""
    norm_scale: Float[Tensor, ""]
    centered: bool
    eps: float

    @property
    def gradient(self) -> Float[Tensor, " d_model"]:
        """That of log p(target), of a contrast of the difference, with respect to the residual.

        The norm's scale answers too: the model's own gradient.
        """
        apart = self.directions[0] - self.prob.to(self.directions.dtype) @ self.directions
        unit = self.resid / self.norm_scale
        return (apart - unit * (unit @ apart) / len(unit)) / self.norm_scale

    @full_precision()
    def loss(
        self,
        rows: Float[Matrix, "neuron d_model"],
        coefficients: Float[Tensor, " neuron"],
        first_order: Float[Tensor, " neuron"],
        weights: Float[Tensor, " d_model"],
    ) -> Float[Tensor, " neuron"]:
        """What log p(target) loses without each neuron, in nats, from the loss at first order.

        A neuron is ``coefficient * row * weights`` in the residual stream here, and more that it
        does by way of others. ``first_order`` is the loss of both, taken as linear. What it is
        here is taken away as it is: each bin's logit moves, the norm is taken anew. The rest of
        ``first_order`` is laid upon the target's logit. Then the softmax is taken once, so that a
        neuron with ``first_order`` alone loses what a logit that falls so far does.
        """
        d_model = len(self.resid)
        probes = torch.cat([self.directions, self.resid[None], torch.ones_like(self.resid[None])])
        # float64, where what is linear is taken from what is not
        # where the rows are, which may be another device
        there, weights = probes.to(rows.device), weights.to(rows.device, probes.dtype)
        products = torch.cat(
            [there * weights @ block.to(there).T for block in rows.split(_ROWS)], 1
        )
        products = (products.to(probes) * coefficients.to(probes)).double()
        moves, along, total = products[:-2], products[-2], products[-1]
        squares = torch.cat(
            [(block.to(there) * weights).square().sum(1) for block in rows.split(_ROWS)]
        )
        size = (squares.to(probes) * coefficients.to(probes).square()).double()
        if self.centered:
            size = size - total.square() / d_model
        scale = self.norm_scale.double()
        left = scale.square() + (size - 2 * along) / d_model
        logits = (self.directions @ self.resid).double()[:, None]
        change = (logits - moves) / left.clamp(min=self.eps).sqrt() - logits / scale
        linear = logits * along / (d_model * scale**3) - moves / scale
        elsewhere = first_order.double() - (self.prob @ linear - linear[0])
        rivalry = self.prob[1:].sum().clamp(min=torch.finfo(torch.float64).tiny)
        change[0] -= elsewhere / rivalry
        after = (self.prob.log()[:, None] + change).logsumexp(0) - change[0]
        return after.to(first_order.dtype)
