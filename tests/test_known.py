"""The paper's filter: what is kept is what a slow loop over plain logits keeps, and every reason is
true; and a corrupted counterpart differs in its subject alone."""

import functools
import random
import tempfile
from dataclasses import replace

import pytest
import torch
from conftest import (
    FAMILIES,
    bridge_of,
    bundled_model,
    count_forward_passes,
    needs_hooked_transformer,
    own_bridge_of,
    own_hooked_of,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tl_neuron_attr import (
    InputError,
    Prompt,
    attribute,
    attribute_all,
    corrupted_of,
    known_prompts,
    open_host,
    paper_prompts,
    tokenize,
)
from tl_neuron_attr.knowledge import KNOWLEDGE_TYPES, Fact, KnowledgePrompt, load_facts
from tl_neuron_attr.targets import one_token

WORDS = [a + b for a in "bcdfghjk" for b in "aeiouxyz"][:61]


@pytest.fixture(scope="module")
def tiny_facts():
    return bundled_model()


@pytest.fixture(scope="module")
def paper():
    """A few of each relation, trained and not."""
    return paper_prompts()[::47]


@pytest.fixture(scope="module")
def plain(tiny_facts, paper):
    return plain_answers(tiny_facts, paper)


@pytest.fixture(scope="module")
def found(tiny_facts, paper):
    return known_prompts(tiny_facts, paper)


def ask(text, answer, kind="t", aliases=(), relation=None, subject="", prompt_id=None):
    fact = Fact(
        knowledge_type=kind,
        relation=relation or kind,
        subject=subject,
        answer=answer,
        aliases=tuple(aliases),
    )
    return KnowledgePrompt(
        prompt_id=prompt_id or text,
        text=text,
        answer=f" {answer}",
        fact=fact,
        phrasing=text.replace(subject, "{subject}") if subject else text,
        held_out=False,
    )


def with_words(model):
    """The model with a tokenizer of 61 words, each with its leading space."""
    vocabulary = {"Ġ" + word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="Ġ" + WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="Ġ" + WORDS[0],
        eos_token="Ġ" + WORDS[0],
        pad_token="Ġ" + WORDS[0],
        clean_up_tokenization_spaces=False,
    )
    if hasattr(model, "set_tokenizer"):  # HookedTransformer, which loads it anew
        with tempfile.TemporaryDirectory() as directory:
            fast.save_pretrained(directory)
            model.set_tokenizer(AutoTokenizer.from_pretrained(directory))
    else:
        model.tokenizer = fast
    return model


def random_prompts(seed, count=40):
    draw = random.Random(seed)
    prompts = []
    for number in range(count):
        words = draw.sample(WORDS[1:], draw.randint(2, 7))
        answer, *aliases = draw.sample(WORDS[1:30], draw.randint(1, 3))
        if draw.random() < 0.2:
            answer += " " + draw.choice(WORDS[1:])  # two tokens
        kind = draw.choice("st")
        name = f"p{number}"
        prompts.append(ask(" ".join(words), answer, kind, aliases, prompt_id=name))
    return prompts


@functools.cache
def answers_of_the_package(kind):
    return {word for fact in load_facts(kind) for word in fact.accepted}


def plain_answers(model, prompts):
    """Prompt after prompt: id -> (its own answers' tokens, its rivals', all logits)."""
    host = open_host(model)

    @functools.cache
    def token(word):
        try:
            return one_token(host, word).id
        except InputError:
            return None

    found = {}
    for prompt in prompts:
        kind = prompt.fact.knowledge_type
        same = [p.fact for p in prompts if p.fact.knowledge_type == kind]
        words = {word for fact in same for word in fact.accepted}
        if kind in KNOWLEDGE_TYPES:
            words |= answers_of_the_package(kind)
        own = [token(word) for word in prompt.fact.accepted if token(word) is not None]
        rivals = {token(word) for word in words} - {None, *own}
        tokens = tokenize(host, Prompt(text=prompt.text)).tokens
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0, -1].double()
        found[prompt.prompt_id] = (own, rivals, logits)
    return found


def by_definition(plain, top=10, above_type=True):
    """Token after token: id -> (reason or None, target, rank, log p)."""
    found = {}
    for prompt_id, (own, rivals, row) in plain.items():
        if not own:
            found[prompt_id] = ("not one token",)
            continue
        logits = row.tolist()
        target = max(own, key=lambda each: logits[each])
        rank = 1 + sum(logit > logits[target] for logit in logits)
        reason = None
        if top is not None and rank > top:
            reason = "not among the top"
        elif above_type and any(logits[other] >= logits[target] for other in rivals):
            reason = "another answer of its type above"
        found[prompt_id] = (reason, target, rank, row.log_softmax(-1)[target].item())
    return found


def assert_as_defined(known, wanted):
    for asked in known.kept:
        reason, target, rank, log_prob = wanted[asked.prompt.prompt_id]
        assert reason is None, asked
        assert (asked.tokenized.target.id, asked.rank) == (target, rank)
        assert asked.log_prob == pytest.approx(log_prob, abs=1e-4)
    for dropped in known.dropped:
        assert wanted[dropped.prompt.prompt_id][0] == dropped.reason, dropped
    kept_or_not = [each.prompt.prompt_id for each in (*known.kept, *known.dropped)]
    assert sorted(kept_or_not) == sorted(wanted)


# --- the filter by its definition -------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_a_loop_over_plain_logits_keeps(family):
    model = with_words(own_bridge_of(family))
    prompts = random_prompts(seed=len(family))
    known = known_prompts(model, prompts, top=20)
    reasons = {each.reason for each in known.dropped}
    assert reasons == {
        "not one token",
        "not among the top",
        "another answer of its type above",
    }, "the case does not test every reason"
    assert_as_defined(known, by_definition(plain_answers(model, prompts), top=20))


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_hooked_transformer_keeps_what_the_loop_keeps(family):
    model = with_words(own_hooked_of(family))
    prompts = random_prompts(seed=3)
    known = known_prompts(model, prompts, top=20)
    assert_as_defined(known, by_definition(plain_answers(model, prompts), top=20))


def test_the_bundled_model_keeps_what_the_loop_keeps(plain, found):
    assert_as_defined(found, by_definition(plain))
    assert len(found.kept) > 50 and len(found.dropped) > 50


def test_prompts_keep_their_order(found, paper):
    place = {prompt.prompt_id: number for number, prompt in enumerate(paper)}
    for listed in (found.kept, found.dropped):
        places = [place[each.prompt.prompt_id] for each in listed]
        assert places == sorted(places)


def test_the_bundled_model_knows_nearly_all_it_was_trained_on_and_little_else(found, paper):
    trained = sum(prompt.fact.trained for prompt in paper)
    kept = [asked.prompt.fact.trained for asked in found.kept]
    assert sum(kept) / trained > 0.95
    assert (len(kept) - sum(kept)) / (len(paper) - trained) < 0.2


@pytest.mark.filterwarnings("ignore:of the relation:UserWarning")  # some choices have one answer
@given(choice=st.sets(st.integers(0, 128), min_size=5, max_size=30))
def test_what_is_kept_of_the_six_types_does_not_depend_on_what_is_asked_beside(
    tiny_facts, paper, found, choice
):
    some = [paper[number % len(paper)] for number in sorted({n % len(paper) for n in choice})]
    ids = {prompt.prompt_id for prompt in some}
    wanted = [asked for asked in found.kept if asked.prompt.prompt_id in ids]
    try:
        kept = known_prompts(tiny_facts, some).kept
    except InputError:
        kept = ()
    assert [(a.prompt.prompt_id, a.rank) for a in kept] == [
        (a.prompt.prompt_id, a.rank) for a in wanted
    ]


def test_the_log_probability_is_that_of_an_attribution(tiny_facts, found):
    for asked in found.kept[:: len(found.kept) // 4]:
        target = asked.tokenized.target.id
        result = attribute(tiny_facts, asked.tokenized.tokens, target=target, top=1)
        assert asked.log_prob == pytest.approx(result.log_prob, abs=1e-4)
        assert asked.tokenized.tokens == result.captured.prompt.tokens


def test_what_is_kept_can_be_attributed_as_it_was_asked(tiny_facts, found):
    asked = found.drawn(12)
    results = attribute_all(tiny_facts, [each.as_prompt() for each in asked], top=1)
    for each, result in zip(asked, results, strict=True):
        assert result.captured.prompt == replace(each.tokenized, text=None)
        assert result.log_prob == pytest.approx(each.log_prob, abs=1e-5)
    nothing = replace(asked[0], tokenized=replace(asked[0].tokenized, target=None))
    with pytest.raises(InputError, match="has no answer to be asked about"):
        nothing.as_prompt()


def test_what_is_drawn_must_count_something(found):
    for wrong in ({"limit": 0}, {"limit": 3, "seed": -1}):
        with pytest.raises(InputError, match="must be at least"):
            found.drawn(**wrong)


def test_all_prompts_run_in_a_few_batches(tiny_facts, paper, monkeypatch):
    passes = count_forward_passes(tiny_facts, monkeypatch)
    known_prompts(tiny_facts, paper[:100])
    assert len(passes) == 2  # one more, on which the model's identities are checked


def test_without_conditions_every_prompt_with_an_answer_of_one_token_is_kept(tiny_facts, paper):
    known = known_prompts(tiny_facts, paper, top=None, above_type=False)
    assert {each.reason for each in known.dropped} == {"not one token"}
    assert len(known.kept) + len(known.dropped) == len(paper)
    assert max(asked.rank for asked in known.kept) > 10


def test_each_condition_can_be_left_out_alone(tiny_facts, paper, plain):
    for top, above_type in ((None, True), (10, False), (1, False)):
        known = known_prompts(tiny_facts, paper, top=top, above_type=above_type)
        assert_as_defined(known, by_definition(plain, top, above_type))


# --- aliases ----------------------------------------------------------------------------------


def test_the_accepted_answer_that_the_model_prefers_is_the_target(tiny_facts):
    prompt = ask("The capital of France is", "Rome", "capital", ["Berlin", "Paris"])
    (asked,) = known_prompts(tiny_facts, [prompt]).kept
    assert asked.tokenized.target.text == " Paris" and asked.rank == 1


def test_an_alias_of_one_token_stands_in_for_an_answer_of_several(tiny_facts):
    prompt = ask("The capital of France is", "Lutetia Parisiorum", "capital", ["Paris"])
    (asked,) = known_prompts(tiny_facts, [prompt]).kept
    assert asked.tokenized.target.text == " Paris"


def test_own_aliases_do_not_compete_and_those_of_others_do(tiny_facts):
    one = ask("The capital of France is", "Paris", "mine", ["Rome"], prompt_id="one")
    two = ask("The capital of Italy is", "Berlin", "mine", prompt_id="two")
    assert {a.prompt.prompt_id for a in known_prompts(tiny_facts, [one, two], top=None).kept} == {
        "one"
    }
    (dropped,) = known_prompts(tiny_facts, [one, two], top=None).dropped
    assert (
        dropped.detail == "' Rome', another answer of its type, is no less probable than ' Berlin'"
    )


# --- reasons and counts -----------------------------------------------------------------------


def test_reasons_say_what_the_model_has(tiny_facts):
    prompts = [
        ask("The capital of France is", "Paris", "capital", prompt_id="kept"),
        ask("The capital of Spain is", "Lutetia", "capital", prompt_id="split"),
        ask("The capital of Italy is", "green", "capital", prompt_id="far"),
        ask("The capital of France is " * 40 + "here", "Paris", "capital", prompt_id="long"),
    ]
    known = known_prompts(tiny_facts, prompts)
    details = {each.prompt.prompt_id: (each.reason, each.detail) for each in known.dropped}
    assert set(details) == {"split", "far", "long"}
    assert details["split"][0] == "not one token"
    assert details["split"][1] == "answer ' Lutetia' is 3 tokens (' Lu', 'tet', 'ia')"
    assert details["long"][0] == "cannot be asked"
    assert "longer than the model's context of 128" in details["long"][1]
    assert details["far"][0] == "not among the top"
    host = open_host(tiny_facts)
    logits = tiny_facts(torch.tensor([tokenize(host, Prompt(text=prompts[2].text)).tokens]))[0, -1]
    rank = 1 + int((logits > logits[one_token(host, " green").id]).sum())
    assert details["far"][1] == f"the answer ' green' has rank {rank}, not among the top 10"
    assert known.summary() == (
        "1 of 4 prompts kept; 1 not one token, 1 cannot be asked, 1 not among the top"
    )
    (row, together) = known.counts().to_dict("records")
    assert row == dict(knowledge_type="capital", asked=4, one_token=3, in_top=1, kept=1)
    assert together == {**row, "knowledge_type": "all"}


def test_counts_are_those_of_the_prompts_one_row_a_type_in_the_papers_order(found, paper):
    counts = found.counts().set_index("knowledge_type")
    assert list(counts.index) == [
        "language", "capital", "country", "color", "number", "month", "all"
    ]  # fmt: skip
    assert (counts.loc["all"] == counts.iloc[:-1].sum()).all()
    for name in counts.index[:-1]:
        assert counts.loc[name, "asked"] == sum(p.fact.knowledge_type == name for p in paper)
        kept = [a for a in found.kept if a.prompt.fact.knowledge_type == name]
        assert counts.loc[name, "kept"] == len(kept)
    reasons = found.reasons()
    assert list(reasons["prompt_id"]) == [each.prompt.prompt_id for each in found.dropped]
    assert (reasons["reason"] == "not one token").sum() == (
        counts.loc["all", "asked"] - counts.loc["all", "one_token"]
    )


def test_a_type_with_one_answer_only_is_warned_of(tiny_facts):
    prompt = ask("The capital of France is", "Paris", "lonely")
    with pytest.warns(UserWarning, match="type 'lonely' only one answer is one token"):
        known = known_prompts(tiny_facts, [prompt])
    assert len(known.kept) == 1 and len(known.warnings) == 1
    assert known_prompts(tiny_facts, [prompt], above_type=False).warnings == ()


# --- what cannot be done ----------------------------------------------------------------------


def test_a_set_without_survivors_is_an_error_with_the_counts(tiny_facts):
    prompts = [
        ask("The capital of France is", "green", "capital", prompt_id="a"),
        ask("The capital of Spain is", "Lutetia", "capital", prompt_id="b"),
    ]
    words = (
        r"no prompt remains: 0 of 2 prompts kept; 1 not one token, 1 not among the top; the first, "
        r"'The capital of France is', because the answer ' green' has rank"
    )
    with pytest.raises(InputError, match=words):
        known_prompts(tiny_facts, prompts)


def test_what_is_wrong_with_a_set_is_said_before_the_model_runs(tiny_facts, monkeypatch):
    passes = count_forward_passes(tiny_facts, monkeypatch)
    prompt = ask("The capital of France is", "Paris")
    for prompts, options, words in (
        ([], {}, "there are no prompts"),
        ([prompt, prompt], {}, "two prompts have the prompt_id 'The capital of France is'"),
        ([prompt], {"top": 0}, "top must be at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=words):
            known_prompts(tiny_facts, prompts, **options)
    with pytest.raises(InputError, match="the model has no tokenizer to read prompts with"):
        known_prompts(bridge_of("gpt2"), [prompt])
    assert passes == []


# --- corrupted counterparts -------------------------------------------------------------------


@pytest.fixture(scope="module")
def capitals(tiny_facts):
    prompts = [p for p in paper_prompts("capital") if p.fact.trained and not p.held_out]
    return known_prompts(tiny_facts, prompts).kept


def test_a_corrupted_prompt_asks_the_same_of_another_subject_in_as_many_tokens(capitals):
    by_id = {asked.prompt.prompt_id: asked for asked in capitals}
    corrupted = {asked: corrupted_of(asked, capitals) for asked in capitals}
    assert sum(other is not None for other in corrupted.values()) > len(capitals) / 2
    for asked, other in corrupted.items():
        fitting = [
            each
            for each in capitals
            if each.prompt.phrasing == asked.prompt.phrasing
            and each.prompt.fact.relation == asked.prompt.fact.relation
            and each.prompt.answer != asked.prompt.answer
            and len(each.tokenized.tokens) == len(asked.tokenized.tokens)
        ]
        if other is None:
            assert fitting == []
        else:
            assert by_id[other.prompt_id] in fitting
            assert other.target.id != asked.tokenized.target.id
            assert other.read_pos == asked.tokenized.read_pos


@given(seed=st.integers(0, 5), order=st.randoms(use_true_random=False))
def test_which_one_is_taken_depends_on_the_seed_alone(capitals, seed, order):
    shuffled = list(capitals)
    order.shuffle(shuffled)
    for asked in capitals[::40]:
        assert corrupted_of(asked, shuffled, seed=seed) == corrupted_of(asked, capitals, seed=seed)


def test_seeds_choose_different_counterparts(capitals):
    taken = {corrupted_of(capitals[0], capitals, seed=seed).prompt_id for seed in range(10)}
    assert len(taken) > 1


def test_an_accepted_answer_of_one_is_none_of_the_other(capitals):
    asked, *_ = (each for each in capitals if corrupted_of(each, capitals))
    other = corrupted_of(asked, capitals)
    rival = next(each for each in capitals if each.prompt.prompt_id == other.prompt_id)
    fact = replace(rival.prompt.fact, aliases=(asked.prompt.fact.answer,))
    with_alias = replace(rival, prompt=replace(rival.prompt, fact=fact))
    assert corrupted_of(asked, [asked, rival]) == other
    assert corrupted_of(asked, [asked, with_alias]) is None
