"""Facts and the sentences that ask for them.

The data are JSON files, one per knowledge type, in ``facts/`` beside this module::

    {"knowledge_type": "capital",
     "relations": [
       {"relation": "country_capital",
        "phrasings": ["The capital of {subject} is", ...],            # a model may train on these
        "held_out_phrasings": ["In {subject}, the capital city is", ...],   # never trained on
        "facts": [{"subject": "France", "answer": "Paris", "aliases": []}, ...]}]}

Rules that a new relation has to keep, all of them tested:

- a phrasing holds ``{subject}`` exactly once and stops right before the answer, which follows
  after one space (a prompt never ends in a space);
- a subject occurs once in a relation, and has one clearly right answer, one word long;
- two prompts with the same text have the same answer, whatever their relations;
- at least six phrasings, two held-out phrasings and three different answers, none of which is
  the answer to more than half of the facts.

A subject is written as it stands in the middle of a sentence ("the Netherlands", "an ant"); a
prompt's first letter is made a capital when the prompt is put together. ``aliases`` are other
right answers ("Farsi" beside "Persian"), for readers who count any right answer.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

KNOWLEDGE_TYPES = ("language", "capital", "country", "color", "number", "month")
"""The six knowledge types of Yu & Ananiadou (2024), in the order of their figures."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One true statement: ``relation`` of ``subject`` is ``answer``."""

    knowledge_type: str
    relation: str
    subject: str
    answer: str
    """The expected next word, without its leading space."""
    aliases: tuple[str, ...] = ()
    """Other right answers, without leading space; never the answer itself."""


@dataclass(frozen=True, kw_only=True)
class KnowledgePrompt:
    """A fact put as a sentence that stops right before its answer."""

    text: str
    answer: str
    """The expected continuation with its leading space, e.g. ``" Paris"``."""
    fact: Fact
    phrasing: str
    """The wording that ``text`` was made from, with ``{subject}`` still in it."""
    held_out: bool
    """Whether the wording is kept out of training."""


def load_facts(knowledge_type: str | None = None) -> tuple[Fact, ...]:
    """The facts of one knowledge type, or of all six, in the order of the files.

    Raises:
        ValueError: If ``knowledge_type`` is not one of ``KNOWLEDGE_TYPES``.
    """
    return tuple(
        fact
        for name in _chosen_types(knowledge_type)
        for relation in _relations(name)
        for fact in _facts_of(name, relation)
    )


def knowledge_prompts(
    knowledge_type: str | None = None, *, held_out: bool | None = None
) -> tuple[KnowledgePrompt, ...]:
    """Every fact in every wording, for one knowledge type or for all six.

    ``held_out`` keeps only the held-out wordings (True), only the others (False), or both (None).

    Raises:
        ValueError: If ``knowledge_type`` is not one of ``KNOWLEDGE_TYPES``.
    """
    kinds = (("phrasings", False), ("held_out_phrasings", True))
    return tuple(
        KnowledgePrompt(
            text=_sentence_start(phrasing, fact.subject),
            answer=f" {fact.answer}",
            fact=fact,
            phrasing=phrasing,
            held_out=is_held_out,
        )
        for name in _chosen_types(knowledge_type)
        for relation in _relations(name)
        for fact in _facts_of(name, relation)
        for key, is_held_out in kinds
        if held_out is None or held_out == is_held_out
        for phrasing in relation[key]
    )


def _chosen_types(knowledge_type: str | None) -> tuple[str, ...]:
    if knowledge_type is None:
        return KNOWLEDGE_TYPES
    if knowledge_type not in KNOWLEDGE_TYPES:
        raise ValueError(
            f"unknown knowledge type {knowledge_type!r}; choose one of "
            f"{', '.join(KNOWLEDGE_TYPES)}, or None for all of them."
        )
    return (knowledge_type,)


def _relations(knowledge_type: str) -> list[dict]:
    source = files("tl_neuron_attr.knowledge") / "facts" / f"{knowledge_type}.json"
    return json.loads(source.read_text(encoding="utf-8"))["relations"]


def _facts_of(knowledge_type: str, relation: dict) -> Iterator[Fact]:
    for entry in relation["facts"]:
        yield Fact(
            knowledge_type=knowledge_type,
            relation=relation["relation"],
            subject=entry["subject"],
            answer=entry["answer"],
            aliases=tuple(entry["aliases"]),
        )


def _sentence_start(phrasing: str, subject: str) -> str:
    text = phrasing.replace("{subject}", subject)
    return text[0].upper() + text[1:]
