"""What is asked, checked before the model runs."""

import numpy as np
import pytest
import torch
from conftest import SHARED, TOKENS, bridge_of, bundled_model
from hypothesis import given
from hypothesis import strategies as st

from tl_neuron_attr import InputError, Prompt, attribute, load_model, open_host, tokenize
from tl_neuron_attr.prompts import as_prompt, fraction, visible
from tl_neuron_attr.targets import resolve_target


@pytest.fixture(scope="module")
def facts_host():
    return open_host(bundled_model())


@pytest.fixture(scope="module")
def stories_host():
    path = SHARED / "models" / "stories260K"
    if not path.exists():
        pytest.skip(f"no SentencePiece model: {path} is absent")
    return open_host(load_model(str(path)))


def test_every_form_of_a_prompt_means_the_same(tiny_gpt2):
    wanted = attribute(tiny_gpt2, TOKENS, top=5, target=3).neurons()
    for form in (
        list(TOKENS),
        torch.tensor(TOKENS),
        torch.tensor([TOKENS]),
        np.array(TOKENS),
        Prompt(tokens=TOKENS, target=3),
    ):
        target = None if isinstance(form, Prompt) else np.int64(3)
        assert attribute(tiny_gpt2, form, top=5, target=target).neurons().equals(wanted)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "no token ids"),
        # as iterators, which the type checks of the tests leave alone, unlike lists
        (iter([1.5, 2]), {}, "a token id must be an integer, got 1.5"),
        ([True], {}, "a token id must be an integer, got True"),
        (iter(["a", "b"]), {}, "for several texts use attribute_all"),
        (torch.zeros(2, 3, dtype=torch.long), {}, r"one prompt.*shape \[2, 3\]"),
        (torch.zeros(3), {}, "integers of shape"),
        ([61], {}, "token id 61 at position 0 is outside the model's vocabulary of 61"),
        ([-1], {}, "token id -1"),
        ([1] * 33, {}, "33 tokens, longer than the model's context of 32"),
        (TOKENS, {"position": 6}, r"position 6 is out of range.*0 to 5, or -6 to -1"),
        (TOKENS, {"position": -7}, "position -7 is out of range"),
        (TOKENS, {"target": 61}, "target id 61 is outside"),
        (TOKENS, {"target": True}, "must be an integer, got True"),
        (TOKENS, {"target": " Paris"}, "no tokenizer to read the target with; give token ids"),
        ("some text", {}, "no tokenizer to read the prompt with; give token ids"),
        (TOKENS, {"position": True}, "position must be an integer"),
        (TOKENS, {"budget": 0}, "budget must be at least 1"),
        (TOKENS, {"cache": (1, 2)}, "the second thing run_with_cache returns; got a tuple"),
        (TOKENS, {"top": 0}, "top must be at least 1"),
        (TOKENS, {"prepend_bos": True}, "leave prepend_bos out"),
        (Prompt(tokens=TOKENS), {"target": 3}, "belong inside the Prompt"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_before_the_forward_pass(
    tiny_gpt2, monkeypatch, prompt, options, words
):
    monkeypatch.setattr(
        type(tiny_gpt2), "run_with_hooks", lambda *a, **k: pytest.fail("the model was run")
    )
    with pytest.raises(InputError, match=words):
        attribute(tiny_gpt2, prompt, **options)


def test_what_is_no_prompt_at_all_is_refused(tiny_gpt2, unchecked):
    for prompt, words in (
        (3, "a prompt must be text, token ids or a Prompt, got 3"),
        ({"tokens": [1]}, "token ids must be integers, got {'tokens'"),
    ):
        with pytest.raises(InputError, match=words):
            attribute(tiny_gpt2, prompt)


def test_a_share_of_a_whole_is_above_0_and_at_most_1():
    assert [fraction(each, "share") for each in (1, "0.5", 1e-9)] == [1.0, 0.5, 1e-9]
    for wrong, words in (
        (True, "share must be a number, got True"),
        ("half", "share must be a number, got 'half'"),
        (0, "share must be above 0 and at most 1, got 0"),
        (1.01, "at most 1, got 1.01"),
        (float("nan"), "at most 1, got nan"),
    ):
        with pytest.raises(InputError, match=words):
            fraction(wrong, "share")


def test_a_prompt_is_text_or_tokens_but_not_both():
    for fields in ({}, {"text": "a", "tokens": (1,)}):
        with pytest.raises(InputError, match="either text or tokens"):
            Prompt(**fields)


def test_a_bos_token_is_added_as_transformer_lens_does_it(facts_host):
    texts = tokenize(facts_host, Prompt(text="The capital of France is")).token_texts
    assert texts == ("<|endoftext|>", "The", " capital", " of", " France", " is")
    bare = tokenize(facts_host, Prompt(text="The capital of France is", prepend_bos=False))
    assert bare.token_texts == texts[1:]
    assert bare.read_pos == 4


def test_a_bos_token_the_model_does_not_have_is_pointed_out():
    path = SHARED / "models" / "slm4096"
    if not path.exists():
        pytest.skip(f"no such model: {path} is absent")
    host = open_host(load_model(str(path)))
    with pytest.raises(InputError, match="BOS token.*prepend_bos=False.*--no-bos"):
        tokenize(host, Prompt(text="Q: Are you"))
    assert len(tokenize(host, Prompt(text="Q: Are you", prepend_bos=False)).tokens) == 10


def test_a_target_of_several_tokens_is_shown_with_a_hint(facts_host):
    with pytest.raises(InputError, match=r"target ' Paris and Rome' is 3 tokens \(' Paris', "):
        resolve_target(facts_host, " Paris and Rome")
    with pytest.raises(InputError, match=r"did you mean ' Paris'\?"):
        resolve_target(facts_host, "Paris")
    assert resolve_target(facts_host, " Paris").text == " Paris"


def test_sentencepiece_targets_are_found_with_and_without_their_space(stories_host):
    spaced, bare = resolve_target(stories_host, " time"), resolve_target(stories_host, "time")
    assert spaced == bare
    assert spaced.text == " time"


@given(st.text(max_size=40))
def test_visible_text_has_no_character_that_hides_or_reorders(text):
    shown = visible(text)
    assert shown.isprintable()
    assert " " not in shown
    if text.isprintable() and " " not in text:
        assert shown == text


def test_a_text_longer_than_the_context_is_not_cut_short(facts_host):
    with pytest.raises(InputError, match="longer than the model's context"):
        tokenize(facts_host, Prompt(text="word " * 400))


def test_a_prompt_object_carries_its_own_options(tiny_gpt2):
    prompt = as_prompt(TOKENS, target=3, position=2)
    assert (prompt.target, prompt.position) == (3, 2)
    result = attribute(tiny_gpt2, Prompt(tokens=TOKENS, target=3, prompt_id="mine"), top=1)
    assert set(result.neurons()["prompt_id"]) == {"mine"}


def test_without_a_tokenizer_tokens_go_by_their_ids():
    host = open_host(bridge_of("gpt2"))
    assert tokenize(host, Prompt(tokens=(3, 4))).token_texts == ("<3>", "<4>")
