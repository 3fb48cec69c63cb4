"""Another answer written into one layer: does it help to know where the old one was localised?

A weight edit adds a matrix to one layer's ``W_out``. Here the sum is formed in the forward pass,
for each row of a batch with a matrix of its own, so the model's weights are never touched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tl_neuron_attr.knowledge import KnowledgePrompt
from tl_neuron_attr.tiny_facts.accuracy import last_logits, prompt_groups

Edits = Float[Tensor, "edit d_mlp d_model"]
"""What is added to ``W_out``."""


def output_weight(model: GPT2LMHeadModel, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """A layer's ``W_out``: the weight itself, not a copy."""
    blocks: Any = model.transformer.h
    return blocks[layer].mlp.c_proj.weight


@contextmanager
def edited(model: GPT2LMHeadModel, layer: int, edits: Edits) -> Iterator[None]:
    """Row i of a batch runs as if ``edits[i]`` had been added to the layer's ``W_out``."""

    def add(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + inputs[0] @ edits

    blocks: Any = model.transformer.h
    hook = blocks[layer].mlp.c_proj.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def fit_edits(
    model: GPT2LMHeadModel,
    layer: int,
    tokens: Int[Tensor, "edit pos"],
    answers: Int[Tensor, " edit"],
    *,
    length: float,
    steps: int = 10,
) -> Edits:
    """Edits of one layer by which each prompt's next token is to become the one in ``answers``.

    Constrained fine-tuning of that matrix alone: ``steps`` steps of the same length along the
    gradient of log p(answer), after each of which an edit whose Frobenius norm is above ``length``
    is brought back to it.

    Cost: ``steps`` forward and backward passes; an edit is d_mlp x d_model floats.
    """
    step = 2.5 * length / steps  # enough to reach the border and to turn there
    edits = torch.zeros(len(tokens), *output_weight(model, layer).shape)
    for _ in range(steps):
        gradient = answer_gradient(model, layer, tokens, answers, edits)
        edits = edits + step * gradient / _norms(gradient).clamp_min(1e-30)
        edits = edits * (length / _norms(edits).clamp_min(1e-30)).clamp(max=1.0)
    return edits


@torch.enable_grad()
def answer_gradient(
    model: GPT2LMHeadModel,
    layer: int,
    tokens: Int[Tensor, "edit pos"],
    answers: Int[Tensor, " edit"],
    edits: Edits,
) -> Edits:
    """The gradient of each row's log p(answer) with respect to its edit."""
    leaf = edits.detach().requires_grad_()
    with edited(model, layer, leaf):
        log_probs = last_logits(model, tokens).log_softmax(-1)
    wanted = log_probs.gather(1, answers[:, None]).sum()
    (gradient,) = torch.autograd.grad(wanted, leaf)
    return gradient


@torch.no_grad()
def probabilities_with(
    model: GPT2LMHeadModel,
    tokenizer: Tokenizer,
    layer: int,
    edits: Edits,
    prompts: Sequence[KnowledgePrompt],
    owners: Int[Tensor, " prompt"],
    answers: Int[Tensor, " prompt"],
) -> Float[Tensor, " prompt"]:
    """p(``answers[i]``) after ``prompts[i]``, under the edit number ``owners[i]``."""
    found = torch.zeros(len(prompts))
    for group in prompt_groups(tokenizer, prompts):
        with edited(model, layer, edits[owners[group.rows]]):
            chances = last_logits(model, group.tokens).softmax(-1)
        found[group.rows] = chances.gather(1, answers[group.rows, None])[:, 0]
    return found


def _norms(matrices: Edits) -> Float[Tensor, "edit 1 1"]:
    return matrices.flatten(1).norm(dim=1)[:, None, None]


# --- how much of the outcome a score explains ---------------------------------------------------


def explained(
    outcome: Float[Tensor, "prompt layer"],
    predictors: Sequence[Float[Tensor, "prompt layer"]],
    *,
    by_layer: bool,
    weights: Float[Tensor, " prompt"] | None = None,
) -> float:
    """R^2 of a linear regression over all prompts and layers.

    On ``predictors``, and with ``by_layer`` on the layer as a factor (a constant of its own for
    each), as Hase et al. (2023) compare them. ``weights`` count each prompt so many times.
    """
    n_prompts, n_layers = outcome.shape
    columns = [each.double().flatten() for each in predictors]
    if by_layer:
        columns += list(torch.eye(n_layers, dtype=torch.float64).repeat(n_prompts, 1).T)
    else:
        columns.append(torch.ones(n_prompts * n_layers, dtype=torch.float64))
    counts = torch.ones(n_prompts, dtype=torch.float64) if weights is None else weights.double()
    root = counts.repeat_interleave(n_layers).sqrt()
    design, values = torch.stack(columns, dim=1), outcome.double().flatten()
    centred = values - (root.square() @ values) / root.square().sum()
    fitted = torch.linalg.lstsq(root[:, None] * design, (root * centred)[:, None]).solution
    residual = root * (centred - (design @ fitted)[:, 0])
    return float(1 - residual.square().sum() / (root * centred).square().sum())


def rank_correlations(
    one: Float[Tensor, "prompt layer"], other: Float[Tensor, "prompt layer"]
) -> Float[Tensor, " prompt"]:
    """Each prompt's rank correlation over the layers (values that never tie)."""
    ranks = [values.argsort(-1).argsort(-1).double() for values in (one, other)]
    a, b = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
