"""How it grew: log p(target) of the residual stream after each layer, at every position.

The logit lens, read out like everything else: in a frozen convention the final norm has, at each
position, the scale it has there at the end of the run, so that steps between layers are scores.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.capture import residuals_at
from tl_neuron_attr.captured import Capture
from tl_neuron_attr.host import Host
from tl_neuron_attr.prompts import Target
from tl_neuron_attr.readout import ReadOut


def log_probs_everywhere(
    host: Host, captured: Capture, out: ReadOut, target: Target
) -> Float[Tensor, "station position"]:
    """log p(target), in nats, of what enters each block, and last of what leaves the last one.

    At every position up to the read position, as if the target came next there; of a contrast the
    difference of the two. At the read position it begins at log p(target) of the embedding, ends at
    that of the run, and grows by a layer's attention and FFN scores in between (in sequential
    blocks).

    Raises:
        InputError: If the prompt, run again, is not the run captured any more.
        NonFiniteError: If the residual stream is not finite.

    Cost: a read-out for each layer and position, and one forward pass (more, if the residual stream
    of all positions does not fit the budget: as many as parts of it do).
    """
    n_positions = captured.prompt.read_pos + 1
    of_position = (host.n_layers + 1) * host.d_model * captured.v.dtype.itemsize
    at_a_time = max(1, out.budget // of_position)
    found = []
    for positions in torch.arange(n_positions).split(at_a_time):
        resid = residuals_at(host, captured, positions)
        found.append(out.log_prob_towards(resid, resid[-1], target))
    return torch.cat(found, dim=1)
