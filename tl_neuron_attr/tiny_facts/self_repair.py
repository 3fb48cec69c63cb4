"""What a removal costs: by what the part itself wrote, and by what is left when the model runs on.

A part is some FFN neurons, attention neurons, or both: a whole layer is all of its neurons. It is
taken away at the read position alone. Nothing then differs before it or at other positions, so
what parts the direct effect from the total is the final norm and the later layers, and no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_neuron_attr.capture import capture_rows
from tl_neuron_attr.captured import Capture
from tl_neuron_attr.forward import Hook
from tl_neuron_attr.hook_points import coefficient_name
from tl_neuron_attr.host import Host
from tl_neuron_attr.pieces import times
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.readout import ReadOut, read_out

MEASURES = ("logit", "log_prob")
"""What an effect is measured in: the answer's logit less the mean over the vocabulary, as McGrath
et al. (2023) measure it, linear under a frozen norm; and its log-probability in nats."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One part a row: which neurons it consists of."""

    ffn: Bool[Tensor, "part layer d_mlp"]
    attn: Bool[Tensor, "part layer head d_head"]

    def __len__(self) -> int:
        return len(self.ffn)


@dataclass(frozen=True, kw_only=True)
class RemovalEffects:
    """What the answer loses with each part; below 0 where it gains. Measures as in ``MEASURES``."""

    direct: Float[Tensor, "part measure"]
    """The part's contribution taken out of the last residual stream, the final norm frozen."""
    renormed: Float[Tensor, "part measure"]
    """The same with the final norm's scale taken anew."""
    total: Float[Tensor, "part measure"]
    """The model run on without it."""
    compensation: Float[Tensor, "part block"]
    """What each block's changed output gives the answer's logit back, norm frozen, by layer,
    attention before FFN; 0 for all blocks up to the part's own."""


def layers_as_parts(host: Host) -> Parts:
    """Every attention and FFN layer as a part, in the order they write."""
    ffn, attn = _nothing(host, 2 * host.n_layers)
    for layer in range(host.n_layers):
        attn[2 * layer, layer] = True
        ffn[2 * layer + 1, layer] = True
    return Parts(ffn=ffn, attn=attn)


def best_as_parts(
    host: Host,
    ffn_scores: Float[Tensor, "layer d_mlp"],
    attn_scores: Float[Tensor, "layer head d_head"],
    top: int,
) -> Parts:
    """The ``top`` best FFN neurons one by one, then all of them at once; the same for attention."""
    ffn, attn = _nothing(host, 2 * (top + 1))
    for each, scores in ((ffn[: top + 1], ffn_scores), (attn[top + 1 :], attn_scores)):
        best = scores.flatten().topk(top).indices
        rows = each.flatten(1)
        rows[torch.arange(top), best] = True
        rows[top, best] = True
    return Parts(ffn=ffn, attn=attn)


def _nothing(host: Host, n_parts: int) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(n_parts, host.n_layers, host.d_mlp, dtype=torch.bool),
        torch.zeros(n_parts, host.n_layers, host.n_heads, host.d_head, dtype=torch.bool),
    )


@torch.no_grad()
@full_precision()
def removal_effects(
    host: Host, captured: Capture, answer: int, parts: Parts, *, instead: Capture | None = None
) -> RemovalEffects:
    """What the token ``answer`` loses with each of ``parts`` in the run ``captured``.

    A removed neuron's coefficient becomes 0, or what it is in the run ``instead`` (resampling).
    Where one part spans several layers its direct effect is what they wrote in the full run.
    Sequential blocks only. Cost: one forward pass of as many rows as there are parts.
    """
    assert not host.parallel, "in parallel blocks an FFN does not read what its attention wrote"
    ffn = torch.zeros_like(captured.mlp_post) if instead is None else instead.mlp_post
    attn = torch.zeros_like(captured.z) if instead is None else instead.z
    at = captured.prompt.read_pos
    hooks: list[Hook] = []
    for layer in range(host.n_layers):
        held = partial(_hold, at=at, where=parts.ffn[:, layer], value=ffn[layer])
        hooks.append((coefficient_name(host, layer, "ffn"), held))
        held = partial(_hold, at=at, where=parts.attn[:, layer], value=attn[layer])
        hooks.append((coefficient_name(host, layer, "attn"), held))
    after = capture_rows(host, [captured.prompt] * len(parts), hooks)

    final = captured.resid_final
    contribution = _written(host, parts, captured.mlp_post - ffn, captured.z - attn)
    frozen = read_out(host, final, "exact")
    anew = read_out(host, final, "recomputed")
    # what was taken from a block is put back: the rest of the difference is how it answered
    changes = _block_outputs(after) - _block_outputs([captured]) + contribution
    (before,) = _measured(frozen, final[None], answer)
    logit_of_changes = _measured(frozen, final + changes.flatten(0, 1), answer)[:, 0] - before[0]
    return RemovalEffects(
        direct=before - _measured(frozen, final - contribution.sum(1), answer),
        renormed=before - _measured(anew, final - contribution.sum(1), answer),
        total=before - _measured(anew, torch.stack([run.resid_final for run in after]), answer),
        compensation=logit_of_changes.view(changes.shape[:2]),
    )


def _hold(activation: Tensor, hook: Any, *, at: int, where: Tensor, value: Tensor) -> Tensor:
    edited = activation.clone()
    edited[:, at] = torch.where(where, value.to(activation), activation[:, at])
    return edited


def _written(
    host: Host,
    parts: Parts,
    ffn: Float[Tensor, "layer d_mlp"],
    attn: Float[Tensor, "layer head d_head"],
) -> Float[Tensor, "part block d_model"]:
    """What the neurons of each part write with these coefficients, by block."""
    blocks = []
    for layer in range(host.n_layers):
        coefficients = (attn[layer] * parts.attn[:, layer]).flatten(1)
        blocks.append(coefficients @ host.W_O(layer).flatten(0, 1).to(attn))
        blocks.append(times(ffn[layer] * parts.ffn[:, layer], host.W_out(layer)))
    return torch.stack(blocks, dim=1)


def _block_outputs(captures: Sequence[Capture]) -> Float[Tensor, "row block d_model"]:
    each = [torch.stack([run.attn_out, run.mlp_out], dim=1).flatten(0, 1) for run in captures]
    return torch.stack(each)


def _measured(
    out: ReadOut, resid: Float[Tensor, "row d_model"], answer: int
) -> Float[Tensor, "row measure"]:
    logits = out.logits(resid)
    logit = logits[:, answer] - logits.mean(-1)
    return torch.stack([logit, logits.log_softmax(-1)[:, answer]], dim=-1)
