"""Facts to training batches: sentences, alone and several in a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_neuron_attr.knowledge import KnowledgePrompt

IGNORED = -100
"""The label that torch's cross entropy leaves out."""

BATCHES_PER_CHUNK = 16
"""Sentences are sorted by length within this many batches: long enough for little padding, short
enough that a batch still mixes relations."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token sequences, padded on the right, with the labels that the loss needs."""

    tokens: Int[Tensor, "batch pos"]
    text_labels: Int[Tensor, "batch pos"]
    """The next token; ``IGNORED`` where that is an answer or padding."""
    answer_labels: Int[Tensor, "batch pos"]
    """The next token where that is an answer, elsewhere ``IGNORED``."""


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A prompt with its answer and a full stop, as tokens."""

    tokens: tuple[int, ...]
    """As the first sentence of a text."""
    following: tuple[int, ...]
    """As a later sentence, after a space. The last token but one is the answer in both."""


def sentences(
    prompts: Sequence[KnowledgePrompt], tokenizer: PreTrainedTokenizerBase
) -> list[Sentence]:
    """One sentence per prompt, in the same order."""
    texts = [f"{prompt.text}{prompt.answer}." for prompt in prompts]
    first = tokenizer(texts, add_special_tokens=False)["input_ids"]
    later = tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
    return [
        Sentence(tokens=tuple(a), following=tuple(b)) for a, b in zip(first, later, strict=True)
    ]


def batches(
    pool: Sequence[Sentence],
    *,
    batch_size: int,
    end_of_text: int,
    no_bos_share: float,
    several_share: float,
    longest: int,
    generator: torch.Generator,
) -> Iterator[Batch]:
    """Batches without end, each of ``batch_size`` sentences in a random order without repeats.

    A share ``no_bos_share`` of the sequences has no ``end_of_text`` in front. In a share
    ``several_share`` of the batches the sentences stand in rows of two to five, as far as these
    fit into ``longest`` tokens.
    """
    stream = _endless_shuffle(len(pool), generator)
    while True:
        chunk = [next(stream) for _ in range(BATCHES_PER_CHUNK * batch_size)]
        chunk.sort(key=lambda i: len(pool[i].tokens))
        for place in torch.randperm(BATCHES_PER_CHUNK, generator=generator).tolist():
            chosen = [pool[i] for i in chunk[place * batch_size : (place + 1) * batch_size]]
            if torch.rand((), generator=generator) < several_share:
                rows = _in_rows(chosen, int(torch.randint(2, 6, (), generator=generator)), longest)
            else:
                rows = [[sentence] for sentence in chosen]
            without_bos = torch.rand(len(rows), generator=generator) < no_bos_share
            yield _batch(rows, without_bos.tolist(), end_of_text)


def _endless_shuffle(size: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(size, generator=generator).tolist()


def _in_rows(chosen: list[Sentence], per_row: int, longest: int) -> list[list[Sentence]]:
    room = longest - 2  # end of text in front and behind
    widest = max(len(sentence.following) for sentence in chosen)
    per_row = max(1, min(per_row, room // widest))
    # Stepping through the batch puts sentences of different lengths, hence topics, into a row.
    rows = len(chosen) // per_row
    return [chosen[start : rows * per_row : rows] for start in range(rows)]


def _batch(rows: list[list[Sentence]], without_bos: list[bool], end_of_text: int) -> Batch:
    sequences: list[list[int]] = []
    answers: list[set[int]] = []
    for row, bare in zip(rows, without_bos, strict=True):
        sequence: list[int] = [] if bare else [end_of_text]
        places = set()
        for number, sentence in enumerate(row):
            sequence += sentence.following if number else sentence.tokens
            places.add(len(sequence) - 2)
        sequences.append([*sequence, end_of_text])
        answers.append(places)
    width = max(map(len, sequences))
    tokens = torch.full((len(sequences), width), end_of_text)
    text_labels = torch.full((len(sequences), width), IGNORED)
    answer_labels = torch.full((len(sequences), width), IGNORED)
    for i, (sequence, places) in enumerate(zip(sequences, answers, strict=True)):
        tokens[i, : len(sequence)] = torch.tensor(sequence)
        for pos in range(1, len(sequence)):
            labels = answer_labels if pos in places else text_labels
            labels[i, pos - 1] = sequence[pos]
    return Batch(tokens=tokens, text_labels=text_labels, answer_labels=answer_labels)
