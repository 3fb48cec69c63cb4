"""Where the model knows it: what is left of an answer without its value neurons."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tl_neuron_attr.attribute import attribute
from tl_neuron_attr.knowledge import KNOWLEDGE_TYPES, KnowledgePrompt, knowledge_prompts
from tl_neuron_attr.neurons import FFNNeuron
from tl_neuron_attr.tiny_facts.accuracy import PromptGroup, last_logits, prompt_groups

ZEROED = (10, 30, 100)
"""How many neurons are zeroed together."""


@dataclass(frozen=True, kw_only=True)
class Zeroing:
    """The answer's mean probability with FFN neurons zeroed at all positions."""

    knowledge_type: str
    """One of ``KNOWLEDGE_TYPES``, or ``"all"``."""
    prompts: int
    original: float
    """With nothing zeroed."""
    top: dict[int, float]
    """By number of neurons: those that raise the answer's log probability most."""
    random: dict[int, float]
    """By number of neurons: as many others, drawn from the same layers."""


def zeroing_effects(
    model: GPT2LMHeadModel,
    bridge: TransformerBridge,
    tokenizer: Tokenizer,
    *,
    prompts_per_type: int = 60,
    seed: int = 0,
) -> list[Zeroing]:
    """What zeroing the value neurons of an answer does to it, beside random neurons.

    ``model`` and ``bridge`` are the same weights as Hugging Face and as TransformerLens have
    them. Looks at ``prompts_per_type`` prompts in trained wordings, drawn with ``seed``; the
    neurons are chosen for each prompt apart, by ``attribute``.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        prompt
        for knowledge_type in KNOWLEDGE_TYPES
        for prompt in _drawn(
            knowledge_prompts(knowledge_type, held_out=False), prompts_per_type, generator
        )
    ]
    original = torch.zeros(len(prompts))
    zeroed = {(kind, n): torch.zeros(len(prompts)) for kind in ("top", "random") for n in ZEROED}
    model.eval()
    with torch.no_grad():
        for group in prompt_groups(tokenizer, prompts):
            original[group.rows] = _answer_probability(model, group)
            ranked = [
                value_neurons(bridge, tokens, answer, top=max(ZEROED))
                for tokens, answer in zip(
                    group.tokens.tolist(), group.answers.tolist(), strict=True
                )
            ]
            for n in ZEROED:
                top = _as_mask([neurons[:n] for neurons in ranked], model)
                for kind, mask in (("top", top), ("random", _random_beside(top, generator))):
                    with _without(model, mask):
                        zeroed[kind, n][group.rows] = _answer_probability(model, group)
    types = [prompt.fact.knowledge_type for prompt in prompts]
    rows = []
    for name in ("all", *KNOWLEDGE_TYPES):
        chosen = torch.tensor([name in ("all", knowledge_type) for knowledge_type in types])
        rows.append(
            Zeroing(
                knowledge_type=name,
                prompts=int(chosen.sum()),
                original=original[chosen].mean().item(),
                top={n: zeroed["top", n][chosen].mean().item() for n in ZEROED},
                random={n: zeroed["random", n][chosen].mean().item() for n in ZEROED},
            )
        )
    return rows


def value_neurons(
    bridge: TransformerBridge, tokens: list[int], answer: int, *, top: int
) -> list[FFNNeuron]:
    """The FFN neurons that raise the log probability of the token ``answer`` most, best first."""
    return attribute(bridge, tokens, target=answer, top=top).ffn_neurons.neurons()


def _answer_probability(model: GPT2LMHeadModel, group: PromptGroup) -> Float[Tensor, " batch"]:
    probability = torch.softmax(last_logits(model, group.tokens), -1)
    return probability.gather(1, group.answers[:, None])[:, 0]


def _drawn(
    prompts: Sequence[KnowledgePrompt], count: int, generator: torch.Generator
) -> list[KnowledgePrompt]:
    return [prompts[i] for i in torch.randperm(len(prompts), generator=generator)[:count].tolist()]


def _as_mask(
    chosen: Sequence[Sequence[FFNNeuron]], model: GPT2LMHeadModel
) -> Bool[Tensor, "batch layer neuron"]:
    mask = torch.zeros(len(chosen), model.config.n_layer, model.config.n_inner, dtype=torch.bool)
    for row, neurons in enumerate(chosen):
        for neuron in neurons:
            mask[row, neuron.layer, neuron.index] = True
    return mask


def _random_beside(
    top: Bool[Tensor, "batch layer neuron"], generator: torch.Generator
) -> Bool[Tensor, "batch layer neuron"]:
    """As many random neurons of each layer as ``top`` has there, none of them in ``top``."""
    order = torch.rand(top.shape, generator=generator).masked_fill(top, 2.0).argsort(-1)
    rank = order.argsort(-1)
    return rank < top.sum(-1, keepdim=True)


@contextmanager
def _without(model: GPT2LMHeadModel, neurons: Bool[Tensor, "batch layer neuron"]) -> Iterator[None]:
    """Zeroes ``neurons`` at all positions, as long as the ``with`` block lasts."""

    def zero(layer: int):
        return lambda module, inputs: (inputs[0].masked_fill(neurons[:, None, layer], 0.0),)

    hooks = [
        block.mlp.c_proj.register_forward_pre_hook(zero(layer))
        for layer, block in enumerate(model.transformer.h)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
