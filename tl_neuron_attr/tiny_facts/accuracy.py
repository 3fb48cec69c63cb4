"""Does the model know it: how often the answer is its most probable next token."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tl_neuron_attr.knowledge import KNOWLEDGE_TYPES, KnowledgePrompt, knowledge_prompts


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often the answer is the most probable next token, as fractions."""

    knowledge_type: str
    """One of ``KNOWLEDGE_TYPES``, or ``"all"``."""
    trained_prompts: int
    trained: float
    held_out_prompts: int
    held_out: float


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """Prompts of the same length in tokens, so that a batch needs no padding."""

    rows: Int[Tensor, " batch"]
    """Places in the list of prompts."""
    tokens: Int[Tensor, "batch pos"]
    """With the beginning of text in front."""
    answers: Int[Tensor, " batch"]
    """The answers' token ids."""


def top1_correct(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, prompts: Sequence[KnowledgePrompt]
) -> Bool[Tensor, " prompt"]:
    """Whether each prompt's most probable next token is its answer."""
    correct = torch.zeros(len(prompts), dtype=torch.bool)
    model.eval()
    with torch.no_grad():
        for group in prompt_groups(tokenizer, prompts):
            correct[group.rows] = last_logits(model, group.tokens).argmax(-1) == group.answers
    return correct


def accuracies(model: GPT2LMHeadModel, tokenizer: Tokenizer) -> list[Accuracy]:
    """Top-1 accuracy over all facts it was trained on, in every wording; then for each type."""
    correct: dict[tuple[str, bool], Tensor] = {}
    for knowledge_type in KNOWLEDGE_TYPES:
        for held_out in (False, True):
            prompts = knowledge_prompts(knowledge_type, held_out=held_out, trained=True)
            correct[knowledge_type, held_out] = top1_correct(model, tokenizer, prompts).float()
    for held_out in (False, True):
        correct["all", held_out] = torch.cat([correct[t, held_out] for t in KNOWLEDGE_TYPES])
    return [
        Accuracy(
            knowledge_type=name,
            trained_prompts=len(correct[name, False]),
            trained=correct[name, False].mean().item(),
            held_out_prompts=len(correct[name, True]),
            held_out=correct[name, True].mean().item(),
        )
        for name in ("all", *KNOWLEDGE_TYPES)
    ]


def prompt_groups(
    tokenizer: Tokenizer, prompts: Sequence[KnowledgePrompt], *, batch_size: int = 256
) -> Iterator[PromptGroup]:
    """All prompts in groups of one length each.

    Raises:
        ValueError: If an answer is more than one token in this vocabulary.
    """
    texts = tokenizer([prompt.text for prompt in prompts], add_special_tokens=False)["input_ids"]
    answers = tokenizer([p.answer for p in prompts], add_special_tokens=False)["input_ids"]
    by_length: dict[int, list[int]] = defaultdict(list)
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        if len(answer) != 1:
            raise ValueError(
                f"the answer {prompts[row].answer!r} is {len(answer)} tokens in this model's "
                f"vocabulary; these measurements need answers of one token."
            )
        by_length[len(text)].append(row)
    for rows in by_length.values():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            yield PromptGroup(
                rows=torch.tensor(part),
                tokens=torch.tensor([[tokenizer.bos_token_id, *texts[row]] for row in part]),
                answers=torch.tensor([answers[row][0] for row in part]),
            )


def last_logits(
    model: GPT2LMHeadModel, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch d_vocab"]:
    """The logits of the next token after ``tokens``."""
    return model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
