"""A capture holds what one position needs, from a run or from a cache, to disk and back."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    FAMILIES,
    SUPPORTED,
    TOKENS,
    bridge_of,
    hooked_of,
    needs_hooked_transformer,
    own_bridge_of,
    own_hooked_of,
)

from tl_neuron_attr import (
    Capture,
    InputError,
    NonFiniteError,
    attribute,
    capture,
    capture_sources,
    load_capture,
    open_host,
    save_capture,
    tokenize,
)
from tl_neuron_attr.capture import capture_all, residuals_at
from tl_neuron_attr.captured import TENSORS
from tl_neuron_attr.forward import final_residuals
from tl_neuron_attr.prompts import Prompt

# Lengths, read positions, repeated tokens and a first token of 0, as no two rows should agree.
BATCH = (
    ((4, 4, 50, 31, 7, 2, 19, 33, 12, 60, 1), 9),
    (TOKENS, -1),
    ((9,), 0),
    ((0, 5, 0), -1),
    (TOKENS, 2),
)
HOOKED_FAMILIES = [
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "phi3"),
    *("opt", "neox", "neox-parallel", "gptj", "bloom"),
]
SIDES = ["right", "left"]


def asked_of(host, batch=BATCH, **prompt):
    return [
        tokenize(host, Prompt(tokens=tokens, position=position, **prompt))
        for tokens, position in batch
    ]


def padded(prompts, side, length=None, fill=60):
    """Token ids [batch, pos] and attention mask of some prompts, as a user would make them."""
    length = length or max(len(prompt.tokens) for prompt in prompts)
    ids, mask = torch.full((len(prompts), length), fill), torch.zeros(len(prompts), length).long()
    for row, prompt in enumerate(prompts):
        n = len(prompt.tokens)
        own = slice(0, n) if side == "right" else slice(length - n, length)
        ids[row, own] = torch.tensor(prompt.tokens)
        mask[row, own] = 1
    return ids, mask


def cache_of(model, prompts, side, **options):
    ids, mask = padded(prompts, side, **options)
    with torch.no_grad():
        return model.run_with_cache(ids, attention_mask=mask)[1]


def forward_passes(model, monkeypatch):
    """The shapes of the token ids of every run from now on."""
    shapes, run = [], type(model).run_with_hooks

    def counted(self, tokens, *args, **kwargs):
        shapes.append(tuple(tokens.shape))
        return run(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "run_with_hooks", counted)
    return shapes


def captured_of(model, **prompt):
    host = open_host(model)
    return capture(host, tokenize(host, Prompt(tokens=TOKENS, **prompt)))


def assert_same_capture(found, wanted, tolerance=0.0):
    for name in TENSORS:
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, atol=tolerance, rtol=0), name


def assert_same_captures(found, wanted, tolerance=1e-5):
    """The same to rounding: ``tolerance`` is relative to the largest number of each tensor."""
    assert [captured.prompt for captured in found] == [captured.prompt for captured in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        for name in TENSORS:
            value = getattr(theirs, name)
            assert (value is None) == (getattr(ours, name) is None)
            if value is not None:
                assert getattr(ours, name).shape == value.shape
                error = (getattr(ours, name) - value).abs().max()
                assert error <= tolerance * value.abs().max(), name


def test_a_capture_holds_no_model_and_little_more_than_it_says(tiny_model):
    host = open_host(tiny_model)
    batches = [capture_all(host, asked_of(host), padding_side=side) for side in SIDES]
    for captured in [captured_of(tiny_model), *batches[0], *batches[1]]:
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


@pytest.mark.parametrize("side", SIDES)
def test_a_cache_without_logits_will_do(tiny_model, side):
    host = open_host(tiny_model)
    prompts = asked_of(host)
    cache = dict(cache_of(tiny_model, prompts, side).items())
    del cache["unembed.hook_out"]
    alone = [capture(host, prompt) for prompt in prompts]
    assert_same_captures(capture_all(host, prompts, cache, padding_side=side), alone)


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "bloom"])  # Bloom's embedding ends in a norm
def test_a_hooked_transformers_cache_will_do(family):
    model = hooked_of(family)
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    without_logits = {name: value for name, value in cache.items() if "unembed" not in name}
    for given in (cache, without_logits):
        captured = attribute(model, TOKENS, cache=given, top=1).captured
        with pytest.raises(InputError, match="cache is of other tokens"):
            attribute(model, (9, *TOKENS[1:]), cache=given)
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
    host = open_host(tiny_model)
    with pytest.raises(InputError, match="cache is of 12 tokens, the prompt of 6"):
        capture(host, tokenize(host, Prompt(tokens=TOKENS)), longer)
    with pytest.raises(InputError, match="batch of 2 prompts, but 1 was given"):
        attribute(tiny_model, TOKENS, cache=batch)
    with pytest.raises(InputError, match="cache is of other tokens"):
        attribute(tiny_model, (*TOKENS[:2], 9, *TOKENS[3:]), cache=cache)


def test_what_happened_at_earlier_positions_can_be_read_from_a_cache(tiny_model, monkeypatch):
    host = open_host(tiny_model)
    captured = capture(host, tokenize(host, Prompt(tokens=TOKENS)))
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(torch.tensor([TOKENS]))
        _, longer = tiny_model.run_with_cache(torch.tensor([TOKENS + TOKENS]))
        _, other = tiny_model.run_with_cache(torch.tensor([TOKENS[::-1]]))
    wanted = vars(capture_sources(host, captured, [4, 1]))
    shapes = forward_passes(tiny_model, monkeypatch)
    found = vars(capture_sources(host, captured, [4, 1], cache))
    assert not shapes and found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor is found[name] is None or torch.equal(found[name], tensor), name
    with pytest.raises(InputError, match="cache is of 12 tokens, the prompt of 6"):
        capture_sources(host, captured, [1], longer)
    with pytest.raises(InputError, match="cache is of other tokens"):
        capture_sources(host, captured, [1], other)
    with pytest.raises(InputError, match="source position 6 is out of range: the read position"):
        capture_sources(host, captured, [1, 6])
    with pytest.raises(InputError, match="source position -1 is out of range"):
        capture_sources(host, captured, [-1, 2])


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
    model = own_bridge_of("gpt2")
    with torch.no_grad():
        model.blocks[1].mlp.b_in[3] = poison
    with pytest.raises(NonFiniteError, match="mlp_(post|out) of layer 1"):
        attribute(model, TOKENS)


# --- several prompts at once ------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_a_batch_gives_what_each_prompt_gives_alone(any_model, side):
    host = open_host(any_model)
    prompts = asked_of(host)
    alone = [capture(host, prompt) for prompt in prompts]
    assert_same_captures(capture_all(host, prompts, padding_side=side), alone)


@needs_hooked_transformer
@pytest.mark.parametrize("family", HOOKED_FAMILIES)
def test_a_batch_on_a_hooked_transformer_gives_what_each_prompt_gives_alone(family):
    host = open_host(hooked_of(family))
    prompts = asked_of(host)
    alone = [capture(host, prompt) for prompt in prompts]
    for side in SIDES:
        assert_same_captures(capture_all(host, prompts, padding_side=side), alone)
        cache = cache_of(host.model, prompts, side)
        assert_same_captures(capture_all(host, prompts, cache, padding_side=side), alone)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [{"processed": True}, {"dtype": torch.bfloat16}])
def test_a_batch_on_folded_or_narrow_weights_gives_it_too(tiny_model, kind, side):
    family = "gpt2" if tiny_model.cfg.normalization_type == "LN" else "llama"
    host = open_host(bridge_of(family, **kind))
    prompts = asked_of(host)
    alone = [capture(host, prompt) for prompt in prompts]
    tolerance = 1e-2 if "dtype" in kind else 1e-5
    assert_same_captures(capture_all(host, prompts, padding_side=side), alone, tolerance)


def test_prompts_of_the_same_tokens_are_run_once(tiny_model, monkeypatch):
    host = open_host(tiny_model)
    short, long = TOKENS[:3], (*TOKENS, 9)
    targets = [3, 9, 17]
    prompts = [
        tokenize(host, Prompt(tokens=tokens, target=target, position=position))
        for target in targets
        for tokens, position in ((short, -1), (long, -1), (long, 1))
    ]
    shapes = forward_passes(tiny_model, monkeypatch)
    captures = capture_all(host, prompts)
    assert shapes == [(2, 7)]
    assert [captured.prompt for captured in captures] == prompts
    assert captures[0].mlp_post is captures[3].mlp_post is captures[6].mlp_post
    assert captures[1].mlp_post is captures[4].mlp_post is not captures[2].mlp_post
    assert capture_all(host, []) == []
    assert len(shapes) == 1


@pytest.mark.parametrize("side", SIDES)
def test_the_cache_of_a_padded_batch_gives_the_same_captures(any_model, side):
    host = open_host(any_model)
    prompts = asked_of(host, target=5)
    cache = cache_of(any_model, prompts, side, length=14)  # longer than the longest prompt
    alone = [capture(host, prompt) for prompt in prompts]
    assert_same_captures(capture_all(host, prompts, cache, padding_side=side), alone)


@pytest.mark.parametrize("side", SIDES)
def test_nothing_at_a_padded_position_is_looked_at(tiny_model, side):
    host = open_host(tiny_model)
    prompts = asked_of(host)
    cache = {name: value.clone() for name, value in cache_of(tiny_model, prompts, side).items()}
    wanted = capture_all(host, prompts, cache, padding_side=side)
    _, mask = padded(prompts, side)
    for name, value in cache.items():
        if name.endswith("hook_pattern"):
            value.transpose(1, 2)[mask == 0] = float("nan")
            value.permute(0, 3, 1, 2)[mask == 0] = float("nan")
        elif value.is_floating_point() and value.shape[:2] == mask.shape:
            value[mask == 0] = float("nan")
    poisoned = {name.split(".")[-1] for name, value in cache.items() if value.isnan().any()}
    assert poisoned >= {"hook_resid_pre", "hook_pattern", "hook_v", "hook_z", "hook_post"}
    assert_same_captures(capture_all(host, prompts, cache, padding_side=side), wanted, 0)


def test_an_unfit_cache_of_a_batch_is_refused_with_the_reason(tiny_model):
    host = open_host(tiny_model)
    prompts = asked_of(host)
    right, left = (cache_of(tiny_model, prompts, side) for side in SIDES)
    with pytest.raises(InputError, match="a batch of 5 prompts, but 4 were given; row i"):
        capture_all(host, prompts[:4], right)
    with torch.no_grad():
        ids = torch.tensor([TOKENS])
        _, without_batch = tiny_model.run_with_cache(ids, remove_batch_dim=True)
        _, unmasked = tiny_model.run_with_cache(padded(prompts, "left")[0])
    with pytest.raises(InputError, match="cache holds 1 prompt, but 5 were given"):
        capture_all(host, prompts, without_batch)
    cut = [dataclasses.replace(p, tokens=p.tokens[:4], read_pos=0) for p in prompts]
    with pytest.raises(InputError, match="cache is of 4 tokens, the longest prompt of 11"):
        capture_all(host, prompts, cache_of(tiny_model, cut, "right"))
    with pytest.raises(InputError, match="padded on the left, not on the right; .*side='left'"):
        capture_all(host, prompts, left)
    with pytest.raises(InputError, match="padded on the right, not on the left"):
        capture_all(host, prompts, right, padding_side="left")
    others = asked_of(host, [BATCH[0], ((8, *TOKENS[1:]), -1), *BATCH[2:]])
    with pytest.raises(InputError, match=r"cache is of other tokens than prompt 0 \('<8><17>"):
        capture_all(host, others, right)
    with pytest.raises(InputError, match="cache is of other tokens"):
        capture_all(host, prompts[::-1], left, padding_side="left")
    with pytest.raises(InputError, match="<22>'.* attends to the padding before it.*_mask"):
        capture_all(host, prompts, unmasked, padding_side="left")
    mixed = {**right, "blocks.1.attn.hook_z": right["blocks.1.attn.hook_z"][:, :7]}
    with pytest.raises(InputError, match="cache is of several runs: 'blocks.1.attn.hook_z'"):
        capture_all(host, prompts, mixed)


@needs_hooked_transformer
def test_an_unfit_cache_of_a_hooked_transformers_batch_is_refused_too():
    host = open_host(hooked_of("gpt2"))
    prompts = asked_of(host)
    right, left = (cache_of(host.model, prompts, side) for side in SIDES)
    with pytest.raises(InputError, match="padded on the left, not on the right"):
        capture_all(host, prompts, left)
    with pytest.raises(InputError, match="cache is of other tokens"):
        capture_all(host, prompts[::-1], right)


@needs_hooked_transformer
def test_pad_tokens_inside_a_prompt_count_as_tokens():
    model = own_hooked_of("gpt2")
    host = open_host(model)
    prompts = asked_of(host, [((0, 0, 5), -1), ((3, 0, 7, 7, 9), -1)])
    wanted = [capture(host, prompt) for prompt in prompts]
    # HookedTransformer masks leading pad tokens of its own accord with such a tokenizer
    model.tokenizer = SimpleNamespace(padding_side="left", pad_token_id=0, bos_token_id=1)
    assert_same_captures([capture(host, prompt) for prompt in prompts], wanted, 0)
    for side in SIDES:
        assert_same_captures(capture_all(host, prompts, padding_side=side), wanted)
    assert model.tokenizer.padding_side == "left"


@pytest.fixture
def long_rope(monkeypatch):
    """A Phi-3 that takes other rotary frequencies if a batch is longer than 8 tokens."""
    class_name, config = FAMILIES["phi3"]
    short = config()
    half = short.hidden_size // short.num_attention_heads // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0] * half,
        "long_factor": [3.0] * half,
    }
    known = {
        name: value
        for name, value in short.to_dict().items()
        if name not in ("rope_parameters", "model_type", "original_max_position_embeddings")
    }

    def longer():
        return transformers.Phi3Config(
            **known, original_max_position_embeddings=8, rope_parameters=rope
        )

    monkeypatch.setitem(SUPPORTED, "phi3", (class_name, longer))
    return own_bridge_of("phi3")


@pytest.mark.changes("the weights")  # the frequencies, which the model chooses by length
def test_a_long_prompt_does_not_change_the_rotary_positions_of_a_short_one(long_rope, monkeypatch):
    host = open_host(long_rope)
    prompts = asked_of(host)
    alone = [capture(host, prompt) for prompt in prompts]
    shapes = forward_passes(long_rope, monkeypatch)
    assert_same_captures(capture_all(host, prompts), alone)
    assert sorted(shapes) == [(1, 11), (3, 6)]


@needs_hooked_transformer
def test_a_hooked_transformers_dynamic_rotary_positions_are_kept_apart_too():
    model = own_hooked_of("llama").eval()
    model.cfg.use_dynamic_ntk_rope, model.cfg.train_seq_length = True, 4
    host = open_host(model)
    prompts = asked_of(host)
    alone = [capture(host, prompt) for prompt in prompts]
    assert_same_captures(capture_all(host, prompts), alone)


def test_left_padding_that_would_give_nan_is_refused_before_the_run(monkeypatch):
    host = open_host(bridge_of("llama", dtype=torch.float64))
    prompts = asked_of(host)
    wanted = [capture(host, prompt) for prompt in prompts]
    assert_same_captures(capture_all(host, prompts), wanted, 1e-12)
    assert_same_captures(capture_all(host, prompts[:1], padding_side="left"), wanted[:1], 0)
    shapes = forward_passes(host.model, monkeypatch)
    with pytest.raises(InputError, match="float64 gives NaN for prompts padded on the left"):
        capture_all(host, prompts, padding_side="left")
    assert not shapes


def test_an_edited_run_and_other_positions_that_are_not_finite_are_said_to_be():
    model = own_bridge_of("gpt2")
    host = open_host(model)
    prompts = [
        dataclasses.replace(each, prompt_id=str(place))
        for place, each in enumerate(asked_of(host, [(TOKENS, -1), ((9, 5), -1), (TOKENS, 0)]))
    ]

    def spoil(activation, hook):
        activation = activation.clone()
        activation[1, 1:] = torch.nan  # of the first prompt no position, of the third none read
        return activation

    hook, last = [("blocks.2.hook_resid_post", spoil)], torch.tensor([5])
    assert final_residuals(host, prompts[::2], hook).isfinite().all()
    with pytest.raises(NonFiniteError, match=r"in prompt 1 \('<9><5>'\), edited, what comes out"):
        final_residuals(host, prompts, hook)
    captured = capture(host, prompts[2])
    assert residuals_at(host, captured, torch.tensor([0])).isfinite().all()
    late = ("blocks.2.hook_resid_post", lambda value, hook: value.index_fill(1, last, torch.nan))
    with model.hooks(fwd_hooks=[late]), pytest.raises(NonFiniteError, match="at an earlier posit"):
        residuals_at(host, captured, last)


def test_what_is_not_finite_after_the_last_layer_is_said_to_be_there():
    model = own_bridge_of("gpt2")
    with torch.no_grad():
        model.unembed.b_U[3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"logits, after the last layer \(2\), holds NaN"):
        attribute(model, TOKENS)


@pytest.mark.parametrize("side", SIDES)
def test_activations_that_are_not_finite_name_their_prompt(side):
    model = own_bridge_of("llama")
    host = open_host(model)
    batch = [(TOKENS, -1), ((9, 5), -1), ((7, 2, 31), -1), ((7, 31, 2), 0)]
    prompts = [
        dataclasses.replace(p, prompt_id=str(i)) for i, p in enumerate(asked_of(host, batch))
    ]
    with torch.no_grad():
        model.embed.weight[31] = float("nan")
    finite = [prompts[number] for number in (0, 1, 3)]
    if side == "right":  # a token after the read position is none of this prompt's business
        capture_all(host, prompts[:2])
    capture_all(host, finite[:2], padding_side=side)
    match = r"in prompt 2 \('<7><2><31>'\) resid_pre of layer 0 holds NaN"
    with pytest.raises(NonFiniteError, match=match):
        capture_all(host, prompts[:3], padding_side=side)


def test_the_callers_own_hooks_act_on_a_batch(tiny_gpt2):
    def zero(value, hook):
        value[..., 5] = 0.0
        return value

    host = open_host(tiny_gpt2)
    with tiny_gpt2.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", zero)]):
        captures = capture_all(host, asked_of(host))
    assert all(captured.mlp_post[0, 5] == 0 for captured in captures)


# --- to disk and back -------------------------------------------------------------------------


def test_a_contrast_survives_the_disk(tiny_gpt2, tmp_path):
    captured = captured_of(tiny_gpt2, target=5, against=9)
    save_capture(captured, tmp_path)
    assert load_capture(tmp_path).prompt == captured.prompt


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
    with pytest.raises(InputError, match="not a capture of format 2"):
        load_capture(tmp_path)
    facts.write_text(json.dumps({**json.loads(text), "prompt": {"tokens": 3}}))
    with pytest.raises(InputError, match="cannot read"):
        load_capture(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        load_capture(tmp_path / "absent")


def test_only_what_is_read_is_unembedded_unless_the_callers_hooks_look(tiny_model, monkeypatch):
    host = open_host(tiny_model)
    prompts = [tokenize(host, Prompt(tokens=tokens)) for tokens in ((5, 6, 7, 8), (9, 10))]
    lengths, hooked = [], []
    unembed = type(tiny_model.unembed).forward

    def counted(module, read, *given, **named):
        logits = unembed(module, read, *given, **named)
        lengths.append(logits.shape[1])
        return logits

    # by no hook, which would be one that looks
    monkeypatch.setattr(type(tiny_model.unembed), "forward", counted)
    try:
        alone = capture_all(host, prompts)
        tiny_model.add_hook(
            "unembed.hook_out", lambda logits, hook: hooked.append(logits.shape[1]) or logits
        )
        beside = capture_all(host, prompts)
    finally:
        tiny_model.reset_hooks()
    assert lengths == [1, 4]  # the read position of each row; all four
    assert hooked == [4]
    for one, other in zip(alone, beside, strict=True):
        assert torch.allclose(one.logits, other.logits, rtol=0, atol=1e-6)
