"""Mixtures of experts: which neurons an FFN with a router has, and what they compute.

A router gives each position a weight for each of its ``k`` best experts; the FFN writes the
weighted sum of what these write. So a neuron of an expert is a neuron like others, whose
coefficient is ``router weight * act(gate) * up``: 0 where its expert was not chosen. Neurons are
numbered through a layer, expert after expert; those of a shared expert, which every position goes
through by a weight of its own, come last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.errors import UnsupportedModelError
from tl_neuron_attr.pieces import Pieces

# Families whose router and experts are known -> whether the chosen experts' weights sum to 1;
# None where the model's configuration says it.
KNOWN: Mapping[str, bool | None] = {
    "MixtralForCausalLM": True,
    "OlmoeForCausalLM": None,
    "Qwen2MoeForCausalLM": None,
    "Qwen3MoeForCausalLM": None,
}

# Families that do not round the weights of experts to the dtype of the model.
_IN_FLOAT32 = frozenset({"MixtralForCausalLM"})


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The FFN of one layer, its weights as views. Row k of each matrix is neuron k's."""

    down: Pieces
    """Subvalues."""
    gate: Pieces
    """Subkeys of the gate pre-activation, and of the other:"""
    up: Pieces
    n_experts: int
    """The routed ones."""
    d_expert: int
    d_shared: int
    """Neurons of the shared expert; 0 if there is none."""
    per_position: int
    """How many routed experts a position is given."""
    sums_to_one: bool
    """Whether the weights of the chosen experts are made to sum to 1."""
    weights_dtype: torch.dtype
    """What these weights are rounded to."""
    act: Any
    shared_router: Float[Tensor, "1 d_model"] | None
    """Its product with what the FFN reads, through a sigmoid, is the shared expert's weight."""


def has_experts(mlp: Any) -> bool:
    """Whether an ``mlp`` is a mixture, and not one of the dense FFNs between them."""
    return hasattr(_inner(mlp), "experts")


def mixture_of(mlp: Any, architecture: str) -> Mixture:
    """The experts inside a bridge's ``mlp``.

    Raises:
        UnsupportedModelError: If it is not laid out as this family's is known to be.
    """
    block = _inner(mlp)
    experts, router = (_inner(getattr(block, name, None)) for name in ("experts", "gate"))
    shared, shared_router = (
        _inner(getattr(block, name, None)) for name in ("shared_expert", "shared_expert_gate")
    )
    gate_up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.ndim == 3):
        raise UnsupportedModelError(
            f"{architecture} is not supported as it is here: its experts are not packed as "
            "experts.gate_up_proj and experts.down_proj; a transformers of version 5 packs them"
        )
    n_experts, _, d_expert = down.shape
    gate_up, down = gate_up.detach(), down.detach().transpose(1, 2)
    stacks = {"down": [down], "gate": [gate_up[:, :d_expert]], "up": [gate_up[:, d_expert:]]}
    if shared is not None:
        stacks["down"].append(_weight(shared.down_proj).T[None])
        stacks["gate"].append(_weight(shared.gate_proj)[None])
        stacks["up"].append(_weight(shared.up_proj)[None])
    always = KNOWN[architecture]
    return Mixture(
        **{name: Pieces(tuple(parts)) for name, parts in stacks.items()},
        n_experts=n_experts,
        d_expert=d_expert,
        d_shared=0 if shared is None else stacks["down"][1].shape[1],
        per_position=int(router.top_k),
        sums_to_one=bool(router.norm_topk_prob) if always is None else always,
        weights_dtype=torch.float32 if architecture in _IN_FLOAT32 else down.dtype,
        act=experts.act_fn,
        shared_router=None if shared_router is None else _weight(shared_router),
    )


def routed(
    mixture: Mixture, logits: Float[Tensor, "place expert"]
) -> tuple[Float[Tensor, "place chosen"], Int[Tensor, "place chosen"]]:
    """Weights and numbers of the experts a position goes to, from its router's logits."""
    # in float32 even where the model computes in float64: Hugging Face does so
    weights, chosen = logits.float().softmax(-1).topk(mixture.per_position, dim=-1)
    if mixture.sums_to_one:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(mixture.weights_dtype), chosen


def coefficients(
    mixture: Mixture,
    read: Float[Tensor, "place d_model"],
    logits: Float[Tensor, "place expert"],
) -> Float[Tensor, "place d_mlp"]:
    """Router weight * act(gate) * up of every neuron: 0 where its expert was not chosen.

    From what the FFN read and what its router gave there; in the dtype of ``read``, computed in
    that of the weights, as the model does. Cost: the gate and up products of chosen experts alone.
    """
    there = read.to(mixture.down.device, mixture.down.dtype)
    weights, chosen = routed(mixture, logits.to(mixture.down.device))
    found = read.new_zeros(len(read), len(mixture.down), device=there.device)
    for expert in chosen.unique().tolist():
        place, slot = (chosen == expert).nonzero(as_tuple=True)
        gate, up = mixture.gate.stacks[0][expert], mixture.up.stacks[0][expert]
        post = _post(mixture, there[place], gate, up).to(found)
        columns = torch.arange(expert * mixture.d_expert, (expert + 1) * mixture.d_expert)
        found[place[:, None], columns.to(place)] = weights[place, slot, None].to(found) * post
    if mixture.d_shared:
        gate, up = mixture.gate.stacks[1][0], mixture.up.stacks[1][0]
        post = _post(mixture, there, gate, up).to(found)
        found[:, -mixture.d_shared :] = _shared_weight(mixture, there).to(found) * post
    return found.to(read.device)


def experts_on(mixture: Mixture, coefficients: Float[Tensor, "place d_mlp"]) -> frozenset[int]:
    """The experts, the shared one last, of which some neuron is on at some of the places."""
    n_routed = mixture.n_experts * mixture.d_expert
    on = (coefficients != 0).any(0)
    experts = on[:n_routed].view(mixture.n_experts, mixture.d_expert).any(1).nonzero()[:, 0]
    return frozenset([*experts.tolist(), *([mixture.n_experts] if mixture.d_shared else [])])


def _post(
    mixture: Mixture,
    read: Float[Tensor, "place d_model"],
    gate: Float[Tensor, "neuron d_model"],
    up: Float[Tensor, "neuron d_model"],
) -> Float[Tensor, "place neuron"]:
    return mixture.act(read @ gate.T) * (read @ up.T)


def _shared_weight(
    mixture: Mixture, read: Float[Tensor, "place d_model"]
) -> Float[Tensor, "place 1"]:
    if mixture.shared_router is None:  # it is added as it is
        return torch.ones_like(read[:, :1])
    return (read @ mixture.shared_router.T).sigmoid()


def _inner(module: Any) -> Any:
    """What a bridge stands around: the module that holds the weights."""
    while isinstance(getattr(module, "original_component", None), torch.nn.Module):
        module = module.original_component
    return module


def _weight(linear: Any) -> Float[Tensor, "_out _in"]:
    return _inner(linear).weight.detach()
