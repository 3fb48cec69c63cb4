"""What happens without it: every neuron zeroed in turn, the ground truth of the other methods."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.capture import check_same_run
from tl_neuron_attr.forward import (
    capture_blocks,
    coefficient_hooks,
    final_residuals,
    tokens_at_a_time,
)
from tl_neuron_attr.hook_points import residual_of
from tl_neuron_attr.methods.case import Case, in_layers, neuron_shape
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.readout import read_out
from tl_neuron_attr.topk import Kind


@torch.no_grad()
@full_precision()
def ablation(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """log p(w) less what is left of it with this neuron alone zeroed at all positions, in nats.

    Exact: the model's own prediction in as many runs as there are neurons, each the same as
    zeroing the neuron's row of ``W_out`` or ``W_O``. Of a contrast, the difference of the two.

    Cost: a row of a forward pass for every neuron, from its layer on, without the unembedding; up
    to 4,096 tokens at a time. Peak memory: one such pass, and the residual stream of every layer.

    Raises:
        InputError: If the model no longer gives what was captured.
        NonFiniteError: If an activation is NaN or infinite.
    """
    result = case.result
    host, prompt = result.host, result.captured.prompt
    n_layers, *rest = neuron_shape(host, kind)
    per_layer = torch.Size(rest).numel()
    outputs = capture_blocks(host, prompt)
    final = residual_of(outputs[-1])[0, prompt.read_pos]
    final = final.to(host.device, torch.promote_types(final.dtype, torch.float32))
    check_same_run(host, result.captured, final)
    # With its norm recomputed, the read-out is what the model itself does. In float64: what most
    # neurons do to a confident answer is less than the rounding of a float32 log-probability.
    out = read_out(host, final, "recomputed", budget=result.out.budget, dtype=torch.float64)
    at_a_time = max(1, tokens_at_a_time(host, kind) // len(prompt.tokens))
    left = [out.log_prob(final[None], result.target)]
    for layer in range(n_layers):
        for some in torch.arange(per_layer, device=host.device).split(at_a_time):
            hooks = coefficient_hooks(host, layer, kind, partial(_without_one, number=some))
            resid = final_residuals(host, [prompt] * len(some), hooks, start=(layer, outputs))
            left.append(out.log_prob(resid, result.target))
    every = torch.cat(left)
    return in_layers(case, kind, (every[0] - every[1:]).to(result.out.dtype))


def _without_one(activation: Tensor, hook: Any, *, number: Int[Tensor, " row"]) -> Tensor:
    """Row i goes without neuron ``number[i]``; attention neurons count by head, then index."""
    # contiguous, so that flatten is a view of it
    edited = activation.clone(memory_format=torch.contiguous_format)
    rows = torch.arange(len(number), device=activation.device)
    edited.flatten(2)[rows, :, number.to(activation.device)] = 0.0
    return edited
