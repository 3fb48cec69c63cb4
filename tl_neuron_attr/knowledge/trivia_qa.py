"""TriviaQA (Joshi et al. 2017), where the paper drew its sentences from: for those with a network.

Which questions the paper took, and how it made sentences of them, was never released. Here a
question is taken if its answer is a word that answers facts of exactly one of this package's six
types: so " Lincoln" counts as a capital, even where the president was meant.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.knowledge.entries import Entry, prompt_of_text, without_repeats
from tl_neuron_attr.knowledge.facts import KnowledgePrompt, load_facts


def load_trivia_qa(
    split: str = "validation",
    *,
    name: str = "mandarjoshi/trivia_qa",
    config: str = "rc.nocontext",
    template: str = "Question: {question}\nAnswer:",
) -> tuple[KnowledgePrompt, ...]:
    """The questions of a split whose answer is of one of the six types, in the split's order.

    Args:
        split: ``train`` or ``validation`` (the answers of ``test`` are not public), or a part as
            ``datasets`` writes it: ``validation[:1000]``.
        name: What ``datasets.load_dataset`` loads: a name on the hub, or a local folder.
        config: Which of its configurations; ``rc.nocontext`` is without the documents.
        template: How a question becomes a prompt, ``{question}`` standing for it.

    Answers are spelt as this package's facts spell them; aliases are those that TriviaQA accepts
    and some fact of the type has.

    Raises:
        InputError: If the package ``datasets`` is absent (extra ``datasets``), or the data set
            cannot be had, is of another form, or holds no such question.
    """
    if template.count("{question}") != 1 or template != template.rstrip():
        raise InputError(
            f"template must hold {{question}} once and not end in a space; got {template!r}"
        )
    rows = _rows(split, name, config)
    entries = list(_entries(rows, template, f"{name}:{split}"))
    if not entries:
        raise InputError(
            f"no question of {name}:{split} has an answer of one of the six knowledge types"
        )
    return without_repeats(entries, f"{name}:{split}")


def _rows(split: str, name: str, config: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            "TriviaQA is loaded with the package datasets, which is not installed; "
            "pip install 'tl_neuron_attr[datasets]'"
        ) from None
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of every kind: no network, no such split, a broken file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load {name}:{split}: {reason}") from error


def _entries(rows: Any, template: str, source: str) -> Iterator[Entry]:
    types = _types()
    for number, row in enumerate(rows):
        where = f"row {number} of {source}"
        question, question_id, value, aliases = _fields(row, where)
        spelt = types.get(value.strip().lower(), {})
        if len(spelt) != 1:
            continue
        ((knowledge_type, answer),) = spelt.items()
        others = (types.get(alias.strip().lower(), {}).get(knowledge_type) for alias in aliases)
        prompt = prompt_of_text(
            prompt_id=f"trivia_qa/{question_id}",
            text=template.replace("{question}", question.strip()),
            answer=answer,
            aliases=[other for other in others if other is not None],
            knowledge_type=knowledge_type,
            relation="trivia_qa",
            where=where,
        )
        yield Entry(prompt=prompt, where=where, published=True)


def _types() -> Mapping[str, Mapping[str, str]]:
    """Every answer and alias of the facts in small letters -> knowledge type -> its spelling."""
    found: dict[str, dict[str, str]] = {}
    for fact in load_facts():
        for word in (fact.answer, *fact.aliases):
            found.setdefault(word.lower(), {}).setdefault(fact.knowledge_type, word)
    return found


def _fields(row: Any, where: str) -> tuple[str, str, str, list[str]]:
    try:
        answer = row["answer"]
        fields = row["question"], row["question_id"], answer["value"], [*answer["aliases"]]
    except (KeyError, TypeError):
        fields = None
    if fields is None or not all(isinstance(text, str) for text in (*fields[:3], *fields[3])):
        raise InputError(
            f"{where} is not as in TriviaQA: it needs question, question_id and answer, with "
            "value and aliases"
        )
    return fields
