"""The facts and the sentences that ask for them."""

import functools
import hashlib
import json
from collections import Counter, defaultdict

import pytest

from tl_neuron_attr import knowledge
from tl_neuron_attr.knowledge import KNOWLEDGE_TYPES

# read once: they are many, and values
knowledge_prompts = functools.cache(knowledge.knowledge_prompts)
load_facts = functools.cache(knowledge.load_facts)
paper_prompts = functools.cache(knowledge.paper_prompts)

SMALLEST = {"color": 50, "month": 50}
"""Facts a knowledge type needs at least; 60 where it is not listed."""


def facts_by_relation():
    relations = defaultdict(list)
    for fact in load_facts():
        relations[fact.relation].append(fact)
    return relations


def phrasings_by_relation(*, held_out):
    wordings = defaultdict(set)
    for prompt in knowledge_prompts():
        if prompt.held_out == held_out:
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
    trained = {prompt.text for prompt in knowledge_prompts() if not prompt.held_out}
    assert [p.text for p in knowledge_prompts() if p.held_out and p.text in trained] == []


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


def test_multiplication_is_right_for_all_factors_from_two_to_nine():
    facts = [f for f in load_facts("number") if f.relation == "multiplication"]
    words = {}
    for fact in facts:
        a, b = (int(word) for word in fact.subject.split(" times "))
        assert fact.answer == str(a * b) and 2 <= a <= b <= 9
        words.setdefault(fact.answer, set()).add(fact.aliases)
    assert len(facts) == 36
    assert words["12"] == {("twelve",)} and words["49"] == {()}


def test_the_months_follow_one_another_and_are_numbered():
    facts = {f.subject: f.answer for f in load_facts("month") if f.relation == "calendar_month"}
    year = ["January"]
    for _ in range(12):
        year.append(facts[f"the month after {year[-1]}"])
    assert year[12] == "January" and len(set(year)) == 12
    assert all(facts[f"the month before {year[i + 1]}"] == year[i] for i in range(12))
    ordinals = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
    assert [facts[f"the {word} month of the year"] for word in ordinals.split()] == year[:12]


def test_atomic_numbers_and_roman_numerals_are_those_of_one_element_or_numeral_each():
    for relation in ("atomic_number", "roman_numeral"):
        answers = [f.answer for f in facts_by_relation()[relation]]
        assert len(set(answers)) == len(answers)


def test_a_roman_numeral_is_worth_what_its_letters_are():
    worth = dict(I=1, V=5, X=10, L=50, C=100, D=500, M=1000)
    for fact in facts_by_relation()["roman_numeral"]:
        values = [worth[letter] for letter in fact.subject]
        signed = [-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True)]
        assert fact.answer == str(sum(signed)), fact


# --- facts that the bundled model was not trained on ------------------------------------------


def test_the_bundled_model_is_trained_and_measured_on_the_prompts_it_always_was():
    prompts = knowledge_prompts(trained=True)
    listed = json.dumps([[p.text, p.answer, p.held_out] for p in prompts])
    assert len(prompts) == 15_292
    assert hashlib.sha256(listed.encode()).hexdigest() == (
        "2d24a7350f5767911a3e23a4d030a7ed7966b48f92521185b547bca69f27f813"
    )


def test_there_is_as_much_as_the_page_on_prompts_says():
    counts = (len(load_facts()), len(knowledge_prompts()), len(paper_prompts()))
    assert counts == (3_028, 33_652, 6_056)


def test_trained_facts_and_those_beyond_are_all_facts():
    trained, beyond = (load_facts(trained=flag) for flag in (True, False))
    assert Counter(trained + beyond) == Counter(load_facts())
    assert all(fact.trained for fact in trained) and not any(fact.trained for fact in beyond)


def test_beyond_the_training_set_are_1500_prompts_at_least_and_some_of_every_type():
    beyond = Counter(fact.knowledge_type for fact in load_facts(trained=False))
    assert sum(beyond.values()) >= 1_500 and min(beyond.values()) >= 150
    assert set(beyond) == set(KNOWLEDGE_TYPES)


def test_no_prompt_of_a_fact_beyond_is_one_of_training():
    trained = {prompt.text for prompt in knowledge_prompts() if prompt.fact.trained}
    beyond = [prompt.text for prompt in knowledge_prompts() if not prompt.fact.trained]
    assert [text for text in beyond if text in trained] == []


def test_a_relation_has_the_same_wordings_for_facts_beyond():
    trained = phrasings_by_relation(held_out=False)
    for prompt in (prompt for prompt in knowledge_prompts() if not prompt.fact.trained):
        assert prompt.held_out or prompt.phrasing in trained[prompt.fact.relation]
    assert {p.phrasing for p in knowledge_prompts("capital") if p.fact.subject == "Ukraine"} == {
        p.phrasing for p in knowledge_prompts("capital") if p.fact.subject == "France"
    }


# --- ids, and the set for evaluations ---------------------------------------------------------


def test_every_prompt_has_an_id_of_its_own_that_names_it():
    prompts = knowledge_prompts()
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts)
    by_id = {prompt.prompt_id: prompt.text for prompt in prompts}
    assert by_id["capital/country_capital/France/2"] == "France's capital is"
    assert by_id["capital/country_capital/France/h0"] == "In France, the capital city is"
    for prompt in prompts:
        fact = prompt.fact
        start, wording = prompt.prompt_id.rsplit("/", 1)
        assert start == f"{fact.knowledge_type}/{fact.relation}/{fact.subject}"
        assert wording.startswith("h") == prompt.held_out


def test_the_paper_set_has_every_fact_twice_once_in_a_held_out_wording():
    prompts = paper_prompts()
    by_id = {prompt.prompt_id: prompt for prompt in knowledge_prompts()}
    assert all(by_id[prompt.prompt_id] == prompt for prompt in prompts)
    of_fact = defaultdict(list)
    for prompt in prompts:
        of_fact[prompt.fact].append(prompt.held_out)
    assert set(of_fact) == set(load_facts())
    assert all(sorted(flags) == [False, True] for flags in of_fact.values())
    assert len({prompt.text for prompt in prompts}) == len(prompts) >= 3_000


def test_the_wordings_of_the_paper_set_occur_about_equally_often():
    counts = defaultdict(Counter)
    for prompt in paper_prompts():
        counts[prompt.fact.relation, prompt.held_out][prompt.phrasing] += 1
    for key, found in counts.items():
        assert max(found.values()) - min(found.values()) <= 1, key


def test_all_types_together_are_the_types_one_after_another():
    together = [fact for name in KNOWLEDGE_TYPES for fact in load_facts(name)]
    assert list(load_facts()) == together
    assert all(fact.knowledge_type == "color" for fact in load_facts("color"))


def test_trained_and_held_out_prompts_together_are_all_prompts():
    parts = [knowledge_prompts("color", held_out=flag) for flag in (False, True)]
    together = Counter(prompt.prompt_id for prompt in parts[0] + parts[1])
    assert together == Counter(prompt.prompt_id for prompt in knowledge_prompts("color"))
    assert not any(prompt.held_out for prompt in parts[0])
    assert all(prompt.held_out for prompt in parts[1])


@pytest.mark.parametrize("read", [load_facts, knowledge_prompts, paper_prompts])
def test_an_unknown_knowledge_type_is_an_error_that_names_the_known_ones(read):
    with pytest.raises(ValueError, match="'colour'.*language, capital, country, color"):
        read("colour")
