"""What is usual: the mean of every coefficient over some prompts."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_neuron_attr.errors import InputError, NonFiniteError
from tl_neuron_attr.forward import coefficient_hooks, run_rows
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.interventions.rows import batches
from tl_neuron_attr.interventions.values import MeanCoefficients
from tl_neuron_attr.neurons import Kind
from tl_neuron_attr.prompts import TokenizedPrompt, as_questions
from tl_neuron_attr.targets import tokenize

Positions = Literal["all", "read"]


def mean_coefficients(
    model: Any,
    prompts: Any,
    *,
    positions: Positions = "all",
    prepend_bos: bool | None = None,
) -> MeanCoefficients:
    """The mean of every coefficient over ``prompts``, in float32 or better.

    Args:
        model: A model, or its ``Host``.
        prompts: One or several: text, token ids, a ``Prompt``, or what ``tokenize`` gives.
        positions: ``"all"``: over every position up to the read position, each counting the same,
            so that long prompts count more. ``"read"``: over the read positions only.
        prepend_bos: Whether texts begin with the BOS token; by default as the model does it. With
            ``"all"`` its coefficients count, and in many models they are unlike all others.

    Raises:
        InputError: If there are no prompts, or one cannot be asked.
        NonFiniteError: If an activation is NaN or infinite.

    Cost: one forward pass of as many rows as there are prompts (several, where they are more than
    4,096 tokens), without unembedding; memory for one mean of each neuron.
    """
    host = model if isinstance(model, Host) else open_host(model)
    if positions not in get_args(Positions):
        raise InputError(f"positions must be 'all' or 'read', got {positions!r}")
    asked = _tokenized(host, prompts, prepend_bos)
    sums: dict[tuple[str, int], Tensor] = {}
    kinds: tuple[tuple[Kind, str], ...] = (("ffn", "ffn"), ("attn", "z"))
    for rows in batches(host, asked):
        some = [asked[row] for row in rows]
        counted = _counted(some, positions)
        hooks = [
            hook
            for layer in range(host.n_layers)
            for kind, name in kinds
            for hook in coefficient_hooks(
                host, layer, kind, partial(_add, counted=counted, sums=sums, key=(name, layer))
            )
        ]
        run_rows(host, some, hooks)
    n_positions = sum(prompt.read_pos + 1 if positions == "all" else 1 for prompt in asked)
    dtype = torch.promote_types(host.dtype, torch.float32)
    ffn, z = (
        (
            torch.stack([sums[name, layer].to(host.device) for layer in range(host.n_layers)])
            / n_positions
        ).to(dtype)
        for name in ("ffn", "z")
    )
    if not (ffn.isfinite().all() and z.isfinite().all()):
        raise NonFiniteError(
            "the model's activations are not finite, so they have no mean; check the weights, or "
            "run in float32"
        )
    return MeanCoefficients(ffn=ffn, z=z, n_positions=n_positions)


def _tokenized(host: Host, prompts: Any, prepend_bos: bool | None) -> list[TokenizedPrompt]:
    if isinstance(prompts, TokenizedPrompt):
        prompts = [prompts]
    if isinstance(prompts, Sequence) and any(isinstance(p, TokenizedPrompt) for p in prompts):
        if not all(isinstance(prompt, TokenizedPrompt) for prompt in prompts):
            raise InputError("give prompts all tokenized, or none")
        return list(prompts)
    questions, _ = as_questions(prompts)
    return [tokenize(host, question.as_prompt(prepend_bos)) for question in questions]


def _counted(prompts: Sequence[TokenizedPrompt], positions: Positions) -> Bool[Tensor, "row pos"]:
    """Which positions of a padded batch count."""
    length = max(len(prompt.tokens) for prompt in prompts)
    reads = torch.tensor([prompt.read_pos for prompt in prompts])[:, None]
    place = torch.arange(length)
    return place <= reads if positions == "all" else place == reads


def _add(
    activation: Float[Tensor, "row pos *unit"],
    hook: Any,
    *,
    counted: Bool[Tensor, "row pos"],
    sums: dict[tuple[str, int], Tensor],
    key: tuple[str, int],
) -> None:
    # in float64: a sum over many positions would lose digits
    total = activation[counted.to(activation.device)].double().sum(0)
    sums[key] = total if key not in sums else sums[key] + total
