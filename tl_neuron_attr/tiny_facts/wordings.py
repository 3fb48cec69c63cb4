"""What else a fact's neurons serve: those found for one prompt, zeroed and looked for in others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tl_neuron_attr.attribute import attribute
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.knowledge import KnowledgePrompt
from tl_neuron_attr.methods import Case, method_of
from tl_neuron_attr.tiny_facts.accuracy import last_logits, prompt_groups
from tl_neuron_attr.tiny_facts.zeroing import without


def _same_fact(one: KnowledgePrompt, other: KnowledgePrompt) -> bool:
    return one.fact == other.fact


def _same_answer(one: KnowledgePrompt, other: KnowledgePrompt) -> bool:
    return one.answer == other.answer


def _same_subject(one: KnowledgePrompt, other: KnowledgePrompt) -> bool:
    return one.fact.subject == other.fact.subject


def _same_relation(one: KnowledgePrompt, other: KnowledgePrompt) -> bool:
    return one.fact.relation == other.fact.relation


def _reversed(one: KnowledgePrompt, other: KnowledgePrompt) -> bool:
    return (one.fact.subject, one.fact.answer) == (other.fact.answer, other.fact.subject)


Kinship = Callable[[KnowledgePrompt, KnowledgePrompt], bool]

KINSHIPS: Mapping[str, Kinship] = MappingProxyType(
    {
        "same fact, another trained wording": lambda one, other: (
            _same_fact(one, other) and one.phrasing != other.phrasing and not other.held_out
        ),
        "same fact, a held-out wording": lambda one, other: (
            _same_fact(one, other) and one.phrasing != other.phrasing and other.held_out
        ),
        "the fact reversed": lambda one, other: _reversed(one, other) and not other.held_out,
        "same wording and answer, another subject": lambda one, other: (
            one.phrasing == other.phrasing
            and _same_answer(one, other)
            and not _same_subject(one, other)
        ),
        "same answer, another relation and subject": lambda one, other: (
            _same_answer(one, other)
            and not (_same_relation(one, other) or _same_subject(one, other))
            and not other.held_out
        ),
        "same wording, another subject and answer": lambda one, other: (
            one.phrasing == other.phrasing and not _same_answer(one, other)
        ),
        "same subject, another relation and answer": lambda one, other: (
            _same_subject(one, other)
            and not (_same_relation(one, other) or _same_answer(one, other))
            and not other.held_out
        ),
        "another knowledge type": lambda one, other: (
            one.fact.knowledge_type != other.fact.knowledge_type
            and not (_same_answer(one, other) or _same_subject(one, other))
            and not other.held_out
        ),
    }
)
"""How another prompt may be related to the one whose neurons were found, closest first."""


def relatives(
    prompt: KnowledgePrompt,
    pool: Sequence[KnowledgePrompt],
    generator: torch.Generator,
    *,
    count: int = 1,
) -> dict[str, list[KnowledgePrompt]]:
    """Of each kinship to ``prompt`` up to ``count`` prompts, drawn from ``pool``."""
    found = {}
    for kinship, holds in KINSHIPS.items():
        kin = [other for other in pool if holds(prompt, other)]
        order = torch.randperm(len(kin), generator=generator)[:count]
        found[kinship] = [kin[place] for place in order.tolist()]
    return found


def ranked_ffn_neurons(
    bridge: TransformerBridge, prompt: KnowledgePrompt, methods: Iterable[str], top: int
) -> dict[str, Int[Tensor, " neuron"]]:
    """The ``top`` best FFN neurons by each method, best first, numbered across layers.

    None by a method that has nothing to say of this prompt (``query``, where all attention neurons
    that matter are in the first layer).
    """
    case = Case(result=attribute(bridge, prompt.text, target=prompt.answer, top=top))
    found = {}
    for method in methods:
        try:
            scores = method_of(method)(case, "ffn", top).flatten()
        except InputError:
            found[method] = torch.zeros(0, dtype=torch.long)
        else:
            found[method] = scores.argsort(descending=True, stable=True)[:top]
    return found


def mask_of(
    neurons: Int[Tensor, " neuron"], n_layers: int, d_mlp: int
) -> Bool[Tensor, "layer d_mlp"]:
    """Which neurons those are that are numbered across layers."""
    mask = torch.zeros(n_layers * d_mlp, dtype=torch.bool)
    mask[neurons] = True
    return mask.view(n_layers, d_mlp)


def overlap(one: Int[Tensor, " neuron"], other: Int[Tensor, " neuron"]) -> float:
    """The share of the one's neurons that are also the other's."""
    return float(torch.isin(one, other).double().mean())


@dataclass(frozen=True, kw_only=True)
class Left:
    """What is left of each prompt's answer."""

    probability: Float[Tensor, " prompt"]
    first: Bool[Tensor, " prompt"]
    """Whether it is the most probable next token."""


@torch.no_grad()
def left_without(
    model: GPT2LMHeadModel,
    tokenizer: Tokenizer,
    prompts: Sequence[KnowledgePrompt],
    zeroed: Bool[Tensor, "prompt layer neuron"],
) -> Left:
    """What is left of the answer of ``prompts[i]`` with the FFN neurons ``zeroed[i]`` held at 0,
    at all positions."""
    probability = torch.zeros(len(prompts))
    first = torch.zeros(len(prompts), dtype=torch.bool)
    for group in prompt_groups(tokenizer, prompts):
        with without(model, zeroed[group.rows]):
            logits = last_logits(model, group.tokens)
        chances = logits.softmax(-1).gather(1, group.answers[:, None])[:, 0]
        probability[group.rows] = chances
        first[group.rows] = logits.argmax(-1) == group.answers
    return Left(probability=probability, first=first)
