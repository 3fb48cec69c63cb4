"""Where the model knows it: what is left of an answer without its value or query neurons."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tl_neuron_attr.attribute import attribute
from tl_neuron_attr.attribution import TOP_VALUES
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
    """By number of neurons: the best of those chosen for the answer."""
    random: dict[int, float]
    """By number of neurons: as many others, drawn from the same layers."""
    foreign: dict[int, float]
    """By number of neurons: those chosen for the answer of a prompt of another type."""


Choice = Callable[..., list[FFNNeuron]]
"""``choice(bridge, tokens, answer, top=...)``: which FFN neurons to zero in a prompt, best first;
fewer where there are no more."""


def value_neurons(
    bridge: TransformerBridge, tokens: list[int], answer: int, *, top: int
) -> list[FFNNeuron]:
    """The FFN neurons that raise the log probability of the token ``answer`` most, best first."""
    ranked = attribute(bridge, tokens, target=answer, top=top).ffn_neurons
    return list(map(FFNNeuron, ranked.layer.tolist(), ranked.index.tolist()))


def query_neurons(
    bridge: TransformerBridge, tokens: list[int], answer: int, *, top: int
) -> list[FFNNeuron]:
    """The FFN neurons that set off the 30 attention neurons that raise it most, best first.

    None, where those all are in the first layer.
    """
    found = attribute(bridge, tokens, target=answer, top=TOP_VALUES).query_neurons(top)
    return list(map(FFNNeuron, found["layer"].tolist(), found["index"].tolist()))


def zeroing_effects(
    model: GPT2LMHeadModel,
    bridge: TransformerBridge,
    tokenizer: Tokenizer,
    *,
    choose: Choice = value_neurons,
    zeroed: Sequence[int] = ZEROED,
    prompts_per_type: int = 60,
    seed: int = 0,
) -> list[Zeroing]:
    """What zeroing the neurons behind an answer does to it, beside two controls.

    ``model`` and ``bridge`` are the same weights as Hugging Face and as TransformerLens have
    them. Looks at ``prompts_per_type`` prompts in trained wordings, drawn with ``seed``; for each
    prompt apart ``choose`` names its neurons, by default the value neurons, of which the first of
    each number in ``zeroed`` are zeroed together. Random neurons show whether the ranking matters,
    another type's whether the neurons matter for this answer alone.

    Raises:
        ValueError: If a knowledge type has fewer prompts than asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for knowledge_type in KNOWLEDGE_TYPES:
        prompts += _drawn(knowledge_type, prompts_per_type, generator)
    groups = list(prompt_groups(tokenizer, prompts))
    masks = _top_masks(model, bridge, groups, len(prompts), choose, zeroed)
    conditions = {"original": torch.zeros_like(masks[zeroed[0]])}
    for n, top in masks.items():
        conditions[f"top {n}"] = top
        conditions[f"random {n}"] = random_beside(top, generator)
        conditions[f"foreign {n}"] = top.roll(prompts_per_type, 0)  # the type before
    remaining = {name: torch.zeros(len(prompts)) for name in conditions}
    model.eval()
    with torch.no_grad():
        for group in groups:
            for name, neurons in conditions.items():
                with without(model, neurons[group.rows]):
                    remaining[name][group.rows] = _answer_probability(model, group)
    types = [prompt.fact.knowledge_type for prompt in prompts]
    rows = []
    for name in ("all", *KNOWLEDGE_TYPES):
        chosen = torch.tensor([name in ("all", knowledge_type) for knowledge_type in types])
        mean = {key: probability[chosen].mean().item() for key, probability in remaining.items()}
        rows.append(
            Zeroing(
                knowledge_type=name,
                prompts=int(chosen.sum()),
                original=mean["original"],
                top={n: mean[f"top {n}"] for n in zeroed},
                random={n: mean[f"random {n}"] for n in zeroed},
                foreign={n: mean[f"foreign {n}"] for n in zeroed},
            )
        )
    return rows


def _answer_probability(model: GPT2LMHeadModel, group: PromptGroup) -> Float[Tensor, " batch"]:
    probability = torch.softmax(last_logits(model, group.tokens), -1)
    return probability.gather(1, group.answers[:, None])[:, 0]


def _drawn(knowledge_type: str, count: int, generator: torch.Generator) -> list[KnowledgePrompt]:
    prompts = knowledge_prompts(knowledge_type, held_out=False, trained=True)
    if not 1 <= count <= len(prompts):
        raise ValueError(
            f"{knowledge_type} has {len(prompts)} trained prompts, but {count} were asked for; "
            f"give prompts_per_type from 1 to {len(prompts)}."
        )
    return [prompts[i] for i in torch.randperm(len(prompts), generator=generator)[:count].tolist()]


def _top_masks(
    model: GPT2LMHeadModel,
    bridge: TransformerBridge,
    groups: Sequence[PromptGroup],
    n_prompts: int,
    choose: Choice,
    zeroed: Sequence[int],
) -> dict[int, Bool[Tensor, "prompt layer neuron"]]:
    """For each number in ``zeroed``: which neurons are so many best ones of each prompt."""
    blocks: Any = model.transformer.h
    shape = (n_prompts, len(blocks), blocks[0].mlp.c_fc.nf)
    masks = {n: torch.zeros(shape, dtype=torch.bool) for n in zeroed}
    for group in groups:
        for row, tokens, answer in zip(
            group.rows.tolist(), group.tokens.tolist(), group.answers.tolist(), strict=True
        ):
            ranked = choose(bridge, tokens, answer, top=max(zeroed))
            for n, mask in masks.items():
                for neuron in ranked[:n]:
                    mask[row, neuron.layer, neuron.index] = True
    return masks


def random_beside(
    top: Bool[Tensor, "prompt layer neuron"], generator: torch.Generator
) -> Bool[Tensor, "prompt layer neuron"]:
    """As many random neurons of each layer as ``top`` has there, none of them in ``top``."""
    order = torch.rand(top.shape, generator=generator).masked_fill(top, 2.0).argsort(-1)
    rank = order.argsort(-1)
    return rank < top.sum(-1, keepdim=True)


@contextmanager
def without(model: GPT2LMHeadModel, neurons: Bool[Tensor, "prompt layer neuron"]) -> Iterator[None]:
    """Zeroes ``neurons`` at all positions, as long as the ``with`` block lasts."""

    def zero(layer: int):
        return lambda module, inputs: (inputs[0].masked_fill(neurons[:, None, layer], 0.0),)

    blocks: Any = model.transformer.h
    hooks = [
        block.mlp.c_proj.register_forward_pre_hook(zero(layer))
        for layer, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
