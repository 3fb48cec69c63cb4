"""Text to tokens: a byte-level BPE in which every answer is one token."""

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tl_neuron_attr.knowledge import KnowledgePrompt

END_OF_TEXT = "<|endoftext|>"
"""Begins a text, ends it and fills up a batch, as in GPT-2."""

ANSWER_WEIGHT = 2_000
"""How often each answer is shown to the BPE: more often than a subject occurs, so that the merges
that build answers come first and the vocabulary's rest goes to the other words."""


def train_tokenizer(
    prompts: Sequence[KnowledgePrompt], *, vocab_size: int, longest: int
) -> PreTrainedTokenizerFast:
    """A GPT-2-style byte-level BPE learnt from ``prompts`` and their answers.

    All 256 bytes are in the alphabet, so any text can be encoded and decoded again. ``longest``
    is the model's context in tokens; the tokenizer truncates to it where it is asked to.

    Raises:
        ValueError: If ``vocab_size`` is too small to make every answer, with its leading space,
            a single token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _lessons(prompts),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
    split = [answer for answer in _answers(prompts) if len(tokenizer.encode(answer)) != 1]
    if split:
        raise ValueError(
            f"{len(split)} answers are more than one token, {split[0]!r} among them; "
            f"give a vocab_size above {vocab_size}."
        )
    return tokenizer


def _lessons(prompts: Sequence[KnowledgePrompt]) -> Iterator[str]:
    yield from (f"{prompt.text}{prompt.answer}." for prompt in prompts)
    yield from (answer * ANSWER_WEIGHT for answer in _answers(prompts))


def _answers(prompts: Sequence[KnowledgePrompt]) -> list[str]:
    return sorted({prompt.answer for prompt in prompts})
