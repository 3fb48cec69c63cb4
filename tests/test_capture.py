"""A capture holds what one position needs, from a run or from a cache, to disk and back."""

import dataclasses
import json

import pytest
import torch
from conftest import TOKENS, bridge_of, hooked_of, needs_hooked_transformer

from tl_neuron_attr import (
    Capture,
    InputError,
    NonFiniteError,
    attribute,
    capture,
    load_capture,
    open_host,
    save_capture,
    tokenize,
)
from tl_neuron_attr.capture import _TENSORS
from tl_neuron_attr.prompts import Prompt


def captured_of(model, **prompt):
    host = open_host(model)
    return capture(host, tokenize(host, Prompt(tokens=TOKENS, **prompt)))


def assert_same_capture(found, wanted, tolerance=0.0):
    for name in _TENSORS:
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert torch.allclose(ours, theirs, atol=tolerance, rtol=0), name


def test_a_capture_holds_no_model_and_little_more_than_it_says(tiny_model):
    captured = captured_of(tiny_model)
    for field in dataclasses.fields(Capture):
        value = getattr(captured, field.name)
        assert not isinstance(value, torch.nn.Module)
        if isinstance(value, torch.Tensor):
            assert not value.requires_grad
            # a view would keep the whole run's activation alive
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


@pytest.mark.parametrize("remove_batch_dim", [False, True])
def test_a_cache_gives_the_same_capture_as_a_run(any_model, remove_batch_dim):
    with torch.no_grad():
        _, cache = any_model.run_with_cache(
            torch.tensor([TOKENS]), remove_batch_dim=remove_batch_dim
        )
    host = open_host(any_model)
    prompt = tokenize(host, Prompt(tokens=TOKENS))
    assert_same_capture(capture(host, prompt, cache), capture(host, prompt), tolerance=1e-6)


def test_a_cache_spares_the_forward_pass(tiny_model, monkeypatch):
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(torch.tensor([TOKENS]))
    wanted = attribute(tiny_model, TOKENS, target=3)
    monkeypatch.setattr(
        type(tiny_model), "run_with_hooks", lambda *a, **k: pytest.fail("the model was run")
    )
    found = attribute(tiny_model, TOKENS, target=3, cache=cache)
    assert found.neurons().equals(wanted.neurons())


def test_a_capture_serves_many_targets_without_another_run(tiny_model, monkeypatch):
    first = attribute(tiny_model, TOKENS, target=3)
    wanted = attribute(tiny_model, TOKENS, target=9)
    monkeypatch.setattr(
        type(tiny_model), "run_with_hooks", lambda *a, **k: pytest.fail("the model was run")
    )
    found = attribute(tiny_model, first.captured, target=9)
    assert found.neurons().equals(wanted.neurons())
    assert not found.neurons().equals(first.neurons())


@needs_hooked_transformer
def test_a_hooked_transformers_cache_without_logits_will_do():
    model = hooked_of("gpt2")
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    captured = attribute(model, TOKENS, cache=cache, top=1).captured
    with pytest.raises(InputError, match="cache is of other tokens"):
        attribute(model, (9, *TOKENS[1:]), cache=cache)
    assert torch.allclose(captured.logits, logits[0, -1], atol=1e-5)


def test_an_unfit_cache_is_refused_with_the_reason(tiny_model):
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(tokens)
        _, longer = tiny_model.run_with_cache(torch.cat([tokens, tokens], dim=1))
        _, batch = tiny_model.run_with_cache(torch.cat([tokens, tokens]))
    partial = {name: value for name, value in cache.items() if "hook_pattern" not in name}
    with pytest.raises(InputError, match="cache lacks 3 activations.*hook_pattern"):
        attribute(tiny_model, TOKENS, cache=partial)
    with pytest.raises(InputError, match="cache is of 12 tokens, the prompt of 6"):
        attribute(tiny_model, TOKENS, cache=longer)
    with pytest.raises(InputError, match="batch of 2 prompts"):
        attribute(tiny_model, TOKENS, cache=batch)
    with pytest.raises(InputError, match="cache is of other tokens"):
        attribute(tiny_model, (*TOKENS[:2], 9, *TOKENS[3:]), cache=cache)


def test_an_earlier_read_position_sees_nothing_of_what_follows(tiny_model):
    early = captured_of(tiny_model, position=2)
    alone = open_host(tiny_model)
    prompt = tokenize(alone, Prompt(tokens=TOKENS[:3]))
    assert_same_capture(early, capture(alone, prompt), tolerance=1e-5)
    assert early.pattern.shape[-1] == 3


def test_negative_positions_count_from_the_end(tiny_model):
    assert_same_capture(captured_of(tiny_model, position=-4), captured_of(tiny_model, position=2))


def test_the_callers_own_hooks_stay_in_force_and_in_place(tiny_gpt2):
    name = "blocks.0.mlp.hook_post"
    plain = captured_of(tiny_gpt2)
    calls = []

    def zero(value, hook):
        calls.append(hook.name)
        value[..., 5] = 0.0
        return value

    with tiny_gpt2.hooks(fwd_hooks=[(name, zero)]):
        edited = captured_of(tiny_gpt2)
        captured_of(tiny_gpt2)
    assert len(calls) == 2
    assert edited.mlp_post[0, 5] == 0 != plain.mlp_post[0, 5]
    assert_same_capture(captured_of(tiny_gpt2), plain)


def test_hooks_are_removed_when_the_forward_pass_fails(tiny_gpt2):
    def fail(value, hook):
        raise RuntimeError("no")

    with tiny_gpt2.hooks(fwd_hooks=[("blocks.2.hook_resid_post", fail)]):
        with pytest.raises(RuntimeError, match="no"):
            attribute(tiny_gpt2, TOKENS)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_layer(poison):
    model = bridge_of("gpt2")
    with torch.no_grad():
        model.blocks[1].mlp.b_in[3] = poison
    with pytest.raises(NonFiniteError, match="mlp_(post|out) of layer 1"):
        attribute(model, TOKENS)


def test_a_capture_survives_the_disk(any_model, tmp_path):
    captured = captured_of(any_model, target=5)
    save_capture(captured, tmp_path / "new" / "folder")
    loaded = load_capture(tmp_path / "new" / "folder")
    assert loaded.prompt == captured.prompt
    assert loaded.model_name == captured.model_name
    assert_same_capture(loaded, captured)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "capture.json",
        "capture.safetensors",
    ]
    again = attribute(any_model, loaded, top=10)
    assert again.neurons().equals(attribute(any_model, captured, top=10).neurons())


def test_a_damaged_capture_is_refused(tiny_gpt2, tmp_path):
    save_capture(captured_of(tiny_gpt2), tmp_path)
    tensors, facts = tmp_path / "capture.safetensors", tmp_path / "capture.json"
    data, text = tensors.read_bytes(), facts.read_text()
    tensors.write_bytes(data[:-4] + b"\0\0\0\1")
    with pytest.raises(InputError, match="damaged"):
        load_capture(tmp_path)
    tensors.write_bytes(data)
    facts.write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match="cannot read"):
        load_capture(tmp_path)
    facts.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(InputError, match="not a capture of format 1"):
        load_capture(tmp_path)
    facts.write_text(json.dumps({**json.loads(text), "prompt": {"tokens": 3}}))
    with pytest.raises(InputError, match="cannot read"):
        load_capture(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        load_capture(tmp_path / "absent")
