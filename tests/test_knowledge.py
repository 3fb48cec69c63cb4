"""The facts and the sentences that ask for them."""

from collections import Counter, defaultdict

import pytest

from tl_neuron_attr.knowledge import KNOWLEDGE_TYPES, knowledge_prompts, load_facts

SMALLEST = {"color": 50, "month": 50}
"""Facts a knowledge type needs at least; 60 where it is not listed."""


def facts_by_relation():
    relations = defaultdict(list)
    for fact in load_facts():
        relations[fact.relation].append(fact)
    return relations


def phrasings_by_relation(*, held_out):
    wordings = defaultdict(set)
    for prompt in knowledge_prompts(held_out=held_out):
        wordings[prompt.fact.relation].add(prompt.phrasing)
    return wordings


@pytest.mark.parametrize("knowledge_type", KNOWLEDGE_TYPES)
def test_every_knowledge_type_has_enough_facts_besides_arithmetic(knowledge_type):
    facts = [f for f in load_facts(knowledge_type) if f.relation != "addition"]
    assert len(facts) >= SMALLEST.get(knowledge_type, 60)


def test_there_are_at_least_560_facts_besides_arithmetic():
    assert sum(fact.relation != "addition" for fact in load_facts()) >= 560


def test_a_subject_occurs_once_in_a_relation():
    seen = Counter((fact.relation, fact.subject) for fact in load_facts())
    assert [pair for pair, count in seen.items() if count > 1] == []


def test_a_relation_belongs_to_one_knowledge_type():
    types = defaultdict(set)
    for fact in load_facts():
        types[fact.relation].add(fact.knowledge_type)
    assert {relation: names for relation, names in types.items() if len(names) > 1} == {}


def test_every_answer_is_one_word_and_not_among_its_own_aliases():
    for fact in load_facts():
        assert fact.answer and not set(fact.answer) & set(" \t\n"), fact
        assert fact.answer not in fact.aliases, fact
        assert all(alias == alias.strip() and alias for alias in fact.aliases), fact


def test_every_relation_has_three_answers_or_more_and_none_is_right_most_of_the_time():
    for relation, facts in facts_by_relation().items():
        answers = Counter(fact.answer for fact in facts)
        assert len(answers) >= 3, relation
        assert answers.most_common(1)[0][1] <= len(facts) / 2, relation


def test_every_relation_has_six_trained_and_two_held_out_phrasings_at_least():
    trained, held_out = (phrasings_by_relation(held_out=flag) for flag in (False, True))
    for relation in facts_by_relation():
        assert len(trained[relation]) >= 6, relation
        assert len(held_out[relation]) >= 2, relation


def test_no_held_out_prompt_is_also_a_trained_one():
    trained = {prompt.text for prompt in knowledge_prompts(held_out=False)}
    assert [p.text for p in knowledge_prompts(held_out=True) if p.text in trained] == []


def test_the_same_words_always_ask_for_the_same_answer():
    answers = defaultdict(set)
    for prompt in knowledge_prompts():
        answers[prompt.text].add(prompt.answer)
    assert {text: found for text, found in answers.items() if len(found) > 1} == {}


def test_a_prompt_is_its_phrasing_with_the_subject_and_a_capital_and_stops_before_the_answer():
    for prompt in knowledge_prompts():
        assert prompt.phrasing.count("{subject}") == 1, prompt
        words = prompt.phrasing.format(subject=prompt.fact.subject)
        assert prompt.text == words[0].upper() + words[1:]
        assert prompt.text == prompt.text.strip()
        assert prompt.answer == f" {prompt.fact.answer}"


def test_the_capital_of_france_is_a_trained_prompt_with_the_answer_paris():
    (prompt,) = [p for p in knowledge_prompts("capital") if p.text == "The capital of France is"]
    assert (prompt.answer, prompt.held_out) == (" Paris", False)


def test_addition_is_right_for_all_operands_from_one_to_nine():
    words = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen"
    ).split()
    sums = {f.subject: f.answer for f in load_facts("number") if f.relation == "addition"}
    assert sums == {f"{a} plus {b}": words[a + b] for a in range(1, 10) for b in range(1, 10)}


def test_all_types_together_are_the_types_one_after_another():
    together = [fact for name in KNOWLEDGE_TYPES for fact in load_facts(name)]
    assert list(load_facts()) == together
    assert all(fact.knowledge_type == "color" for fact in load_facts("color"))


def test_trained_and_held_out_prompts_together_are_all_prompts():
    parts = [knowledge_prompts("color", held_out=flag) for flag in (False, True)]
    assert Counter(parts[0] + parts[1]) == Counter(knowledge_prompts("color"))
    assert not any(prompt.held_out for prompt in parts[0])
    assert all(prompt.held_out for prompt in parts[1])


@pytest.mark.parametrize("read", [load_facts, knowledge_prompts])
def test_an_unknown_knowledge_type_is_an_error_that_names_the_known_ones(read):
    with pytest.raises(ValueError, match="'colour'.*language, capital, country, color"):
        read("colour")
