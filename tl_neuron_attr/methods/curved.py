"""A gradient that bends: first-order scores carried through the final norm and softmax as they are.

``gradient x activation`` is what zeroing a neuron takes from log p(w) at first order, and is the
closest to zeroing it that one backward pass gives. It goes wrong where the neuron is large, and
most of that is known without another pass: at the read position the neuron's own vector, so that
the final norm's scale and each rival's logit without it are too; and that log p(w) bends as w's
logit falls. Both are put in here, at the cost of a few dot products a neuron.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.decompose import outlet
from tl_neuron_attr.methods.case import Case, neuron_shape
from tl_neuron_attr.methods.gradients import gradient_activation
from tl_neuron_attr.pieces import Matrix
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import at_least_one
from tl_neuron_attr.readout import read_out
from tl_neuron_attr.rivals import Rivals
from tl_neuron_attr.topk import Kind

RIVALS = 8
"""How many of the answer's rivals keep a logit of their own; all others share one."""


def curved_gradient(
    case: Case, kind: Kind, top: int | None = None, *, rivals: int = RIVALS
) -> Float[Tensor, "..."]:
    """Gradient x activation over all positions, bent as the final norm and softmax bend, in nats.

    Of what has been tried the closest to ``ablation`` at the cost of one forward and one backward
    pass. What a neuron wrote at the read position is taken out of the final residual as it is, and
    the rest of its first-order effect, which comes by way of later layers, is taken from the
    answer's logit before the softmax. Neurons of the last FFN come out exact but for the ``rivals``
    (the answer's likeliest competitors, which are looked at one by one; all others as one).

    It fails where later layers are not linear: a neuron that switches others, or heads, on or off
    altogether is judged by how it would do so by a hair. It says nothing of several neurons
    zeroed together.

    Cost: one forward and one backward pass, and ``rivals + 4`` dot products a neuron.

    Raises:
        InputError: If ``rivals`` is below 1; of several accepted answers or a distribution; if the
            model no longer gives what was captured.
    """
    rivals = at_least_one(rivals, "rivals")
    competing = answer_and_rivals(case, rivals)  # first: it may refuse the target
    return bent(case, kind, gradient_activation(case, kind, top), competing)


def answer_and_rivals(case: Case, count: int = RIVALS) -> Rivals:
    """The answer and what it competes with at the read position, as the model itself sees it."""
    result = case.result
    final = result.captured.resid_final
    # with its norm recomputed, the read-out is what the model itself does
    out = read_out(result.host, final, "recomputed", budget=result.out.budget)
    with torch.no_grad():
        return out.rivals(final, result.target, count)


@torch.no_grad()
@full_precision()
def bent(
    case: Case, kind: Kind, first_order: Float[Tensor, "..."], rivals: Rivals
) -> Float[Tensor, "..."]:
    """First-order losses of log p(w) bent as the final norm and softmax bend, neuron by neuron.

    They must hold what the neuron does at the read position without anything in between, at first
    order and with the final norm's scale answering. A soft cap on logits is taken by its slope.
    """
    host, captured = case.result.host, case.result.captured
    shape = neuron_shape(host, kind)
    layers = []
    rows: Matrix
    for layer in range(host.n_layers):
        if kind == "ffn":
            rows, coefficients = host.W_out(layer), captured.mlp_post[layer]
        else:
            rows, coefficients = host.W_O(layer).flatten(0, 1), captured.z[layer].flatten()
        through = outlet(host, captured, kind, layer)
        weights = through(torch.ones_like(captured.resid_final))
        losses = rivals.loss(rows, coefficients, first_order[layer].flatten(), weights)
        layers.append(losses)
    return torch.stack(layers).view(shape)
