"""A prompt's corrupted counterpart: the same question about something else, of the same length.

Patching methods replace what happened in one run by what happened in the other, position by
position, so both must be as long, and differ in nothing but the subject.
"""

import hashlib
from collections.abc import Iterable

from tl_neuron_attr.knowledge.known import AskedPrompt
from tl_neuron_attr.prompts import TokenizedPrompt


def corrupted_of(
    asked: AskedPrompt, among: Iterable[AskedPrompt], *, seed: int = 0
) -> TokenizedPrompt | None:
    """One of ``among`` in the wording of ``asked``, about another subject, as many tokens long.

    No right answer of one is a right answer of the other. Which one of several is taken depends on
    ``seed`` and the prompts' ids alone, not on their order; ``None`` where there is none.
    """
    fitting = [other for other in among if _fits(asked, other)]
    if not fitting:
        return None

    def draw(other: AskedPrompt) -> bytes:
        drawn = (str(seed), asked.prompt.prompt_id, other.prompt.prompt_id)
        return hashlib.sha256("\0".join(drawn).encode()).digest()

    return min(fitting, key=draw).tokenized


def _fits(asked: AskedPrompt, other: AskedPrompt) -> bool:
    one, two = asked.prompt, other.prompt
    # cheapest first: this is asked of every pair
    return (
        len(asked.tokenized.tokens) == len(other.tokenized.tokens)
        and one.phrasing == two.phrasing
        and one.fact.relation == two.fact.relation
        and one.fact.knowledge_type == two.fact.knowledge_type
        and one.fact.subject != two.fact.subject
        and one.text != two.text
        and asked.tokenized.read_pos == other.tokenized.read_pos
        and not set(one.fact.accepted) & set(two.fact.accepted)
    )
