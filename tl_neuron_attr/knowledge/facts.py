"""Facts and the sentences that ask for them.

The data are JSON files, one per knowledge type, in ``facts/`` beside this module::

    {"knowledge_type": "capital",
     "relations": [
       {"relation": "country_capital",
        "phrasings": ["The capital of {subject} is", ...],            # a model may train on these
        "held_out_phrasings": ["In {subject}, the capital city is", ...],   # never trained on
        "facts": [{"subject": "France", "answer": "Paris", "aliases": []}, ...]}]}

The bundled model was trained on all facts of these files. ``facts/beyond/`` holds as many files of
the same form with facts that it never saw: of relations of its own, or further subjects of a
relation above, which then has no wordings there.

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

KNOWLEDGE_TYPES = ("language", "capital", "country", "color", "number", "month")
"""The six knowledge types of Yu & Ananiadou (2024), in the order of their figures."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One true statement: ``relation`` of ``subject`` is ``answer``."""

    knowledge_type: str
    """One of ``KNOWLEDGE_TYPES``, or what a set of your own calls it."""
    relation: str
    subject: str
    answer: str
    """The expected next word, without its leading space."""
    aliases: tuple[str, ...] = ()
    """Other right answers, without leading space; never the answer itself."""
    trained: bool = False
    """Whether the bundled model was trained on it (in the wordings that are not held out)."""

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every right answer with its leading space, ``answer`` first."""
        return tuple(f" {word}" for word in (self.answer, *self.aliases))


@dataclass(frozen=True, kw_only=True)
class KnowledgePrompt:
    """A fact put as a sentence that stops right before its answer."""

    prompt_id: str
    """Unique in its set, the same in every run: ``capital/country_capital/France/2`` for the
    wording number 2 (from 0), ``.../h0`` for the first that is held out."""
    text: str
    answer: str
    """The expected continuation with its leading space, e.g. ``" Paris"``."""
    fact: Fact
    phrasing: str
    """The wording that ``text`` was made from, with ``{subject}`` still in it."""
    held_out: bool
    """Whether the wording is kept out of training; False for a set of your own."""


def load_facts(
    knowledge_type: str | None = None, *, trained: bool | None = None
) -> tuple[Fact, ...]:
    """The facts of one knowledge type, or of all six, in the order of the files.

    ``trained`` keeps only those the bundled model was trained on (True), only the others (False),
    or both (None).

    Raises:
        ValueError: If ``knowledge_type`` is not one of ``KNOWLEDGE_TYPES``.
    """
    return tuple(
        fact for relation in _relations(knowledge_type, trained) for fact in _facts_of(relation)
    )


def knowledge_prompts(
    knowledge_type: str | None = None,
    *,
    held_out: bool | None = None,
    trained: bool | None = None,
) -> tuple[KnowledgePrompt, ...]:
    """Every fact in every wording, for one knowledge type or for all six.

    ``held_out`` keeps only the held-out wordings (True), only the others (False), or both (None);
    ``trained`` chooses facts as in ``load_facts``.

    Raises:
        ValueError: If ``knowledge_type`` is not one of ``KNOWLEDGE_TYPES``.
    """
    kinds = (("phrasings", False), ("held_out_phrasings", True))
    return tuple(
        _prompt(fact, phrasing, number, is_held_out)
        for relation in _relations(knowledge_type, trained)
        for fact in _facts_of(relation)
        for key, is_held_out in kinds
        if held_out is None or held_out == is_held_out
        for number, phrasing in enumerate(relation[key])
    )


def paper_prompts(knowledge_type: str | None = None) -> tuple[KnowledgePrompt, ...]:
    """The set that evaluations use: every fact twice, once in a held-out wording.

    Wordings take turns over a relation's facts, so that all of them occur about equally often, and
    most prompts have others of the same wording. It is the same set in every run.

    Raises:
        ValueError: If ``knowledge_type`` is not one of ``KNOWLEDGE_TYPES``.
    """
    kinds = (("phrasings", False), ("held_out_phrasings", True))
    turns: dict[str, int] = {}
    prompts = []
    for relation in _relations(knowledge_type, None):
        for fact in _facts_of(relation):
            turn = turns.get(fact.relation, 0)
            turns[fact.relation] = turn + 1
            for key, is_held_out in kinds:
                number = turn % len(relation[key])
                prompts.append(_prompt(fact, relation[key][number], number, is_held_out))
    return tuple(prompts)


def in_order(knowledge_types: Iterable[str]) -> list[str]:
    """Each type once: the six in the order of ``KNOWLEDGE_TYPES``, then others by name."""
    place = {name: number for number, name in enumerate(KNOWLEDGE_TYPES)}
    return sorted(set(knowledge_types), key=lambda name: (place.get(name, len(place)), name))


def _relations(knowledge_type: str | None, trained: bool | None) -> Iterator[dict[str, Any]]:
    """The relations of the chosen files; of several types one type after another."""
    if knowledge_type is not None and knowledge_type not in KNOWLEDGE_TYPES:
        raise ValueError(
            f"unknown knowledge type {knowledge_type!r}; choose one of "
            f"{', '.join(KNOWLEDGE_TYPES)}, or None for all of them."
        )
    for name in KNOWLEDGE_TYPES if knowledge_type is None else (knowledge_type,):
        known = _file(name)
        if trained is not False:
            yield from ({**relation, "type": name, "trained": True} for relation in known)
        if trained is not True:
            wordings = {
                relation["relation"]: {
                    key: relation[key] for key in ("phrasings", "held_out_phrasings")
                }
                for relation in known
            }
            for relation in _file("beyond", name):
                shared = wordings.get(relation["relation"], {})
                yield {**shared, **relation, "type": name, "trained": False}


def _file(*names: str) -> list[dict[str, Any]]:
    *folders, name = names
    source = files("tl_neuron_attr.knowledge").joinpath("facts", *folders, f"{name}.json")
    return json.loads(source.read_text(encoding="utf-8"))["relations"]


def _facts_of(relation: dict[str, Any]) -> Iterator[Fact]:
    for entry in relation["facts"]:
        yield Fact(
            knowledge_type=relation["type"],
            relation=relation["relation"],
            subject=entry["subject"],
            answer=entry["answer"],
            aliases=tuple(entry["aliases"]),
            trained=relation["trained"],
        )


def _prompt(fact: Fact, phrasing: str, number: int, held_out: bool) -> KnowledgePrompt:
    text = phrasing.replace("{subject}", fact.subject)
    wording = f"h{number}" if held_out else str(number)
    return KnowledgePrompt(
        prompt_id=f"{fact.knowledge_type}/{fact.relation}/{fact.subject}/{wording}",
        text=text[0].upper() + text[1:],
        answer=f" {fact.answer}",
        fact=fact,
        phrasing=phrasing,
        held_out=held_out,
    )
