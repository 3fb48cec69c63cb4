"""One prompt of a set that is not this package's: as it was read, checked, each text once."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.knowledge.facts import Fact, KnowledgePrompt

UNTYPED = "untyped"
"""The knowledge type of prompts that name none: their answers all belong together."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A prompt as it was read, and where, for errors."""

    prompt: KnowledgePrompt
    where: str
    published: bool
    """Whether it is of a file that a user does not write: LRE, known_1000."""


def prompt_of_text(
    *,
    prompt_id: str,
    text: str,
    answer: str,
    aliases: Sequence[str] = (),
    knowledge_type: str = UNTYPED,
    relation: str | None = None,
    subject: str = "",
    where: str,
) -> KnowledgePrompt:
    """A prompt that is not of this package's facts; ``where`` names its place in errors.

    Its wording is the text with ``{subject}`` for the subject, or the text itself where that does
    not occur in it.

    Raises:
        InputError: If the text is empty or ends in a space, or an answer is empty, has more than
            one space in front, or any behind.
    """
    texts = (text, answer, *aliases, knowledge_type, relation or "", subject, prompt_id)
    if any("\ud800" <= char <= "\udfff" for part in texts for char in part):
        raise InputError(f"{where}: half a character (a lone surrogate) is not valid text")
    if not text.strip():
        raise InputError(f"{where}: the text is empty")
    if text != text.rstrip():
        raise InputError(
            f"{where}: the text {text[-40:]!r} ends in a space; answers are joined to it with "
            "one space, so leave that out"
        )
    for word in (answer, *aliases):
        bare = word.removeprefix(" ")
        if not bare or bare != bare.strip():
            raise InputError(
                f"{where}: the answer {word!r} must be some text, with at most one space in "
                "front and none behind"
            )
    bare = answer.removeprefix(" ")
    others = dict.fromkeys(alias.removeprefix(" ") for alias in aliases)
    return KnowledgePrompt(
        prompt_id=prompt_id,
        text=text,
        answer=f" {bare}",
        fact=Fact(
            knowledge_type=knowledge_type,
            relation=relation or knowledge_type,
            subject=subject,
            answer=bare,
            aliases=tuple(other for other in others if other != bare),
        ),
        phrasing=_phrasing(text, subject),
        held_out=False,
    )


def _phrasing(text: str, subject: str) -> str:
    if not subject:
        return text
    if subject in text:
        return text.replace(subject, "{subject}", 1)
    # at the start of a sentence it may have got a capital
    begins = text[: len(subject)]
    if begins[1:] == subject[1:] and begins[:1].lower() == subject[:1].lower():
        return "{subject}" + text[len(subject) :]
    return text


def without_repeats(entries: Sequence[Entry], name: str) -> tuple[KnowledgePrompt, ...]:
    """Each text with the same answer once; a warning counts and names what occurred again.

    Raises:
        InputError: If two prompts have one id, or, in a file that a user wrote, one text and
            relation but different answers.
    """
    taken: dict[tuple[str, str, str], Entry] = {}
    of_text: dict[str, list[tuple[str, str, str]]] = {}
    by_id: dict[str, Entry] = {}
    repeated: list[str] = []
    joined: list[str] = []
    for entry in entries:
        prompt = entry.prompt
        # the same words may well ask for something else in another relation
        key = (prompt.fact.knowledge_type, prompt.fact.relation, prompt.text)
        same = of_text.setdefault(prompt.text, [])
        own = set(prompt.fact.accepted)
        if any(own <= set(taken[each].prompt.fact.accepted) for each in same):
            repeated.append(f"{prompt.text!r} ({entry.where})")
        elif key not in taken:
            namesake = by_id.setdefault(prompt.prompt_id, entry)
            if namesake is not entry:
                raise InputError(
                    f"{entry.where}: the prompt_id {prompt.prompt_id!r} is that of "
                    f"{namesake.where} already; ids must be unique"
                )
            taken[key] = entry
            same.append(key)
        elif entry.published:
            joined.append(f"{prompt.answer!r} of {prompt.text!r} ({entry.where})")
            taken[key] = replace(taken[key], prompt=_joined(taken[key].prompt, prompt))
        else:
            first = taken[key]
            raise InputError(
                f"{entry.where}: the text {prompt.text!r} is that of {first.where}, with the "
                f"answer {prompt.answer!r} instead of {first.prompt.answer!r}; if both are right, "
                "make one an alias"
            )
    for what, listed in (
        ("prompts occur again and are taken once", repeated),
        ("further answers to a text are taken as its aliases", joined),
    ):
        if listed:
            shown = "; ".join(listed[:3]) + ("; ..." if len(listed) > 3 else "")
            warnings.warn(f"in {name!r}, {len(listed)} {what}: {shown}", stacklevel=3)
    return tuple(entry.prompt for entry in taken.values())


def _joined(first: KnowledgePrompt, other: KnowledgePrompt) -> KnowledgePrompt:
    words = dict.fromkeys((*first.fact.aliases, other.fact.answer, *other.fact.aliases))
    aliases = tuple(word for word in words if word != first.fact.answer)
    return replace(first, fact=replace(first.fact, aliases=aliases))
