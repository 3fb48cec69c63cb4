"""What autograd tells: gradients with respect to coefficients, at every position, by the model.

Gradients are the model's own, through attention patterns, norms and activations; nothing is
frozen. They are taken with respect to what hooks put in, so that parameters keep their flags and
gather no ``.grad``. What is differentiated is log p(w) (of a contrast, the difference), unless
said otherwise. A backward pass costs about two forward passes.
"""

from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.capture import check_same_run
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.forward import (
    capture_blocks,
    coefficient_hooks,
    coefficients_everywhere,
    final_residuals,
    tokens_at_a_time,
)
from tl_neuron_attr.host import Host
from tl_neuron_attr.methods.case import Case, in_layers, neuron_shape
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import Target, at_least_one
from tl_neuron_attr.readout import read_out
from tl_neuron_attr.topk import Kind

Quantity = Literal["prob", "log_prob"]
Positions = Literal["read", "all"]


def gradient_activation(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """Coefficient times the gradient of log p(w), summed over all positions, in nats.

    To first order what zeroing the neuron everywhere takes from log p(w). Cost: one forward and one
    backward pass, for all neurons together.

    Raises:
        InputError: If the model no longer gives what was captured.
    """
    coefficients, gradients = coefficients_and_gradients(case, kind)
    return _scores(case, kind, (coefficients * gradients).sum(1))


def attribution_patching(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """What each neuron takes from log p(w) if it does as in the corrupted prompt, to first order.

    (coefficient - its value in the corrupted prompt) times the gradient in the clean one, summed
    over all positions, in nats; above 0 where the neuron speaks for the answer. Source: Nanda
    (2023), *Attribution patching*. Cost: two forward passes and a backward pass.

    Raises:
        InputError: If the case has no corrupted prompt.
    """
    if case.corrupted is None:
        raise InputError(
            "attribution patching needs a corrupted prompt, in which the answer is another; give "
            "Case(result=..., corrupted=tokenize(host, Prompt(...)))"
        )
    neuron_shape(case.result.host, kind)
    coefficients, gradients = coefficients_and_gradients(case, kind)
    corrupted = coefficients_everywhere(case.result.host, case.corrupted, kind)
    return _scores(case, kind, ((coefficients - corrupted) * gradients).sum(1))


@full_precision()
def coefficients_and_gradients(
    case: Case, kind: Kind
) -> tuple[Float[Tensor, "layer pos neuron"], Float[Tensor, "layer pos neuron"]]:
    """Every coefficient, and the gradient of log p(w) with respect to it, at every position.

    Attention neurons are numbered by head, then index. The model's own log p(w), whatever
    convention the prompt was attributed by. Cost: one forward and one backward pass, whose memory
    is that of training on one prompt.
    """
    host, prompt = case.result.host, case.result.captured.prompt
    neuron_shape(host, kind)
    check_differentiable(host)
    coefficients: list[Tensor] = []
    nudges: list[Tensor] = []

    def nudged(activation: Tensor, hook: Any) -> Tensor:
        # gradients with respect to what is added: also where the model's weights take none
        nudge = torch.zeros_like(activation, requires_grad=True)
        coefficients.append(activation[0].detach().flatten(1))
        nudges.append(nudge)
        return activation + nudge

    layers = range(host.n_layers)
    hooks = [hook for layer in layers for hook in coefficient_hooks(host, layer, kind, nudged)]
    with torch.inference_mode(False), torch.enable_grad():
        resid = final_residuals(host, [prompt], hooks, differentiable=True)
        check_same_run(host, case.result.captured, resid[0].detach())
        (quantity,) = _read(case, resid, "log_prob")
        gradients = torch.autograd.grad(quantity, nudges)
    wide = torch.promote_types(host.dtype, torch.float32)
    return (
        torch.stack([layer.to(host.device, wide) for layer in coefficients]),
        torch.stack([layer[0].flatten(1).to(host.device, wide) for layer in gradients]),
    )


@full_precision()
def integrated_gradients(
    case: Case,
    kind: Kind,
    top: int | None = None,
    *,
    steps: int = 20,
    positions: Positions = "read",
    quantity: Quantity = "prob",
) -> Float[Tensor, "..."]:
    """Knowledge neurons: gradients integrated while one layer's coefficients grow from 0.

    For each layer by itself ``coefficient * mean over k = 1..steps of dF/dcoefficient``, where the
    layer's coefficients are scaled by ``k / steps`` (a right Riemann sum from a baseline of 0) and
    all other layers run on what follows from that. By default as published: F is p(w), 20 steps,
    and only the coefficients at the read position are scaled. ``positions="all"`` scales, and sums
    over, every position; ``quantity="log_prob"`` is in nats, as the other methods are.

    Source: Dai et al. (2022), *Knowledge neurons in pretrained transformers*, equation 2. Cost:
    ``steps`` forward and backward passes from each layer on. Peak memory: that of training on
    ``steps`` prompts, or on 4,096 tokens if that is less.

    Raises:
        InputError: If an option is none of those named; if the model no longer gives what was
            captured.
    """
    steps = at_least_one(steps, "steps")
    for value, known, what in (
        (positions, get_args(Positions), "positions"),
        (quantity, get_args(Quantity), "quantity"),
    ):
        if value not in known:
            raise InputError(f"{what} must be one of {', '.join(known)}; got {value!r}")
    target = case.result.target
    if quantity == "prob" and target.distribution is not None:
        raise InputError(f"{target.words} has no probability; take quantity='log_prob'")
    host, captured = case.result.host, case.result.captured
    neuron_shape(host, kind)
    check_differentiable(host)
    prompt = captured.prompt
    scaled = slice(None) if positions == "all" else slice(prompt.read_pos, prompt.read_pos + 1)
    at_a_time = max(1, tokens_at_a_time(host, kind) // len(prompt.tokens))
    grown: list[Tensor] = []
    clean: list[Tensor] = []

    def grow(activation: Tensor, hook: Any, *, by: Float[Tensor, " row"]) -> Tensor:
        activation = activation.detach()
        clean.append(activation[0, scaled])
        # products in the weights' own dtype, so that k / steps = 1 is the run itself
        scale = by.to(activation).view(-1, *[1] * (activation.ndim - 1))
        grown.append((scale * activation[:, scaled]).requires_grad_())
        edited = activation.clone()
        edited[:, scaled] = grown[-1]
        return edited

    layers = []
    with torch.inference_mode(False), torch.enable_grad():
        factors = torch.arange(1, steps + 1, device=host.device) / steps
        outputs = capture_blocks(host, prompt)
        for layer in range(host.n_layers):
            total: Tensor | None = None
            for some in factors.split(at_a_time):
                hooks = coefficient_hooks(host, layer, kind, partial(grow, by=some))
                resid = final_residuals(
                    host,
                    [prompt] * len(some),
                    hooks,
                    start=(layer, outputs),
                    differentiable=True,
                )
                if float(some[-1]) == 1.0:
                    check_same_run(host, captured, resid[-1].detach())
                value = _read(case, resid, quantity).sum()
                (gradient,) = torch.autograd.grad(value, grown.pop())
                wide = torch.promote_types(gradient.dtype, torch.float32)
                here = (gradient.to(wide) * clean.pop()).sum((0, 1)).flatten() / steps
                total = here if total is None else total + here
            assert total is not None
            layers.append(total.to(host.device))
    return _scores(case, kind, torch.stack(layers))


def check_differentiable(host: Host) -> None:
    """Stop before the forward pass where torch could not go back through it."""
    if any(weight.is_inference() for weight in host.parameters):
        raise InputError(
            "the model's weights were made under torch.inference_mode(), so nothing can be "
            "differentiated; load it outside of that"
        )


def _read(case: Case, resid: Float[Tensor, "row d_model"], quantity: Quantity) -> Tensor:
    """The model's own log p(w) or p(w) of each row, its final norm taken anew; of a contrast the
    difference of the two."""
    result = case.result
    # with its norm recomputed, the read-out is what the model itself does
    out = read_out(
        result.host,
        result.captured.resid_final,
        "recomputed",
        budget=result.out.budget,
        dtype=resid.dtype,
    )
    target = result.target
    if quantity == "log_prob":
        return out.log_prob(resid, target)
    if target.against is None:
        return out.log_prob(resid, target).exp()
    chance = out.log_prob(resid, Target(id=target.id)).exp()
    return chance - out.log_prob(resid, target.against).exp()


def _scores(case: Case, kind: Kind, each: Float[Tensor, "layer neuron"]) -> Float[Tensor, "..."]:
    like = case.result.captured.mlp_post
    return in_layers(case, kind, each.to(like.device, case.result.out.dtype).flatten())
