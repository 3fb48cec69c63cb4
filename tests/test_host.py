"""One adapter over both classes: the same numbers from each, and a clear refusal of the rest."""

import warnings

import pandas as pd
import pytest
import torch
import transformers
from conftest import (
    FAMILIES,
    HOOKED,
    MIXTURES,
    REFUSED,
    SUPPORTED,
    TOKENS,
    bridge_from,
    bridge_of,
    hooked_of,
    needs_hooked_transformer,
    own_bridge_of,
)

from tl_neuron_attr import (
    IdentityError,
    InputError,
    UnsupportedModelError,
    attribute,
    capture,
    open_host,
    tokenize,
)
from tl_neuron_attr.architecture import is_centred
from tl_neuron_attr.hook_points import block_outputs, has_hooks, starting_at
from tl_neuron_attr.host import weights_hash
from tl_neuron_attr.identities import identities
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import Prompt

TARGET = 7


def attribute_quietly(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return attribute(model, TOKENS, target=TARGET, top=10_000)


def assert_same_numbers(found, wanted, *, attention_neurons=True):
    assert found.log_prob == pytest.approx(wanted.log_prob, abs=1e-5)
    tables = [("layers", ["layer", "kind"]), ("heads", ["layer", "head"])]
    frames = [(getattr(found, name)(), getattr(wanted, name)(), key) for name, key in tables]
    if not attention_neurons:  # heads and attention layers differ too: b_V moved into b_O
        frames[1:] = []
    frames.append((found.neurons("ffn"), wanted.neurons("ffn"), ["layer", "index"]))
    if attention_neurons:
        key = ["layer", "head", "source_pos", "index"]
        frames.append((found.neurons("attn"), wanted.neurons("attn"), key))
        frames.append((found.positions(), wanted.positions(), ["layer", "head", "source_pos"]))
    for ours, theirs, key in frames:
        merged = ours.merge(theirs, on=key, suffixes=("", "_wanted"))
        assert len(merged) == len(ours) == len(theirs)
        assert (merged["score"] - merged["score_wanted"]).abs().max() < 1e-5


def test_every_identity_holds_on_every_supported_family(any_model):
    host = open_host(any_model)
    captured = capture(host, tokenize(host, Prompt(tokens=TOKENS)))
    found = identities(host, captured)
    assert {identity.name for identity in found} == {
        "the residual stream",
        "the attention pattern",
        "the attention neurons",
        "the FFN neurons",
        "the read-out",
    }
    for identity in found:
        assert identity.error < 5e-6, identity
        assert identity.holds


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "neox", "neo", "gemma", *MIXTURES])
def test_a_processed_bridge_gives_the_raw_ones_numbers(family):
    raw, processed = bridge_of(family), bridge_of(family, processed=True)
    assert open_host(raw).processing == "raw"
    found, wanted = attribute_quietly(processed), attribute_quietly(raw)
    assert "norms" in found.host.processing
    # the others have no value biases to fold
    folded = family in ("gpt2", "qwen2", "neox", "neo", "qwen2moe")
    assert found.host.value_biases_folded == folded
    assert_same_numbers(found, wanted, attention_neurons=not folded)


def test_folded_value_biases_bring_a_warning_that_says_how_to_load_raw():
    with pytest.warns(UserWarning, match="value biases were folded.*no_processing"):
        result = attribute(bridge_of("gpt2", processed=True), TOKENS, top=3)
    assert len(result.warnings) == 1
    assert "value biases" in result.facts()["warnings"][0]


def test_a_raw_model_brings_no_warning(any_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attribute(any_model, TOKENS, top=3).warnings == ()


@needs_hooked_transformer
@pytest.mark.parametrize("family", [name for name in HOOKED if name in FAMILIES])
def test_hooked_transformer_gives_the_bridges_numbers(family):
    wanted = attribute_quietly(bridge_of(family))
    raw = attribute_quietly(hooked_of(family))
    assert raw.host.class_name == "HookedTransformer"
    assert raw.host.processing == "raw"
    assert_same_numbers(raw, wanted)
    processed = attribute_quietly(hooked_of(family, processed=True))
    assert "norms" in processed.host.processing
    assert_same_numbers(processed, wanted, attention_neurons=not processed.host.value_biases_folded)


@needs_hooked_transformer
def test_folding_all_but_value_biases_changes_no_number():
    wanted = attribute_quietly(bridge_of("gpt2"))
    found = attribute_quietly(hooked_of("gpt2", processed=True, fold_value_biases=False))
    assert not found.warnings
    assert_same_numbers(found, wanted)


@pytest.mark.parametrize("family", list(REFUSED))
def test_a_family_that_would_come_out_wrong_is_refused_by_name(family):
    class_name, _, reason = REFUSED[family]
    with pytest.raises(UnsupportedModelError, match=f"{class_name}.*{reason}"):
        open_host(bridge_of(family))


def test_value_vectors_clipped_where_mpt_keeps_its_setting_are_refused_too():
    for clip, refused in ((None, False), (0.05, True)):
        config = transformers.MptConfig(
            d_model=24,
            n_heads=4,
            n_layers=2,
            max_seq_len=32,
            vocab_size=61,
            expansion_ratio=2,
            attn_config={"clip_qkv": clip},
        )
        model = bridge_from("MptForCausalLM", config)
        if not refused:
            assert open_host(model).n_layers == 2
            continue
        with pytest.raises(UnsupportedModelError, match="clips its value vectors"):
            open_host(model)


def test_tokens_read_as_the_tokenizer_has_them_that_the_model_has_now():
    class Tokenizer:
        def __init__(self, name):
            self.name = name

        def convert_ids_to_tokens(self, token):
            return f"{self.name}{token}"

        def decode(self, tokens, clean_up_tokenization_spaces):
            return f"{self.name}{tokens[0]}"

    model = own_bridge_of("gpt2")
    host = open_host(model)
    for name in "abcdefgh":  # each is freed before the next is made, which may take its place
        model.tokenizer = None
        model.tokenizer = Tokenizer(name)
        assert [host.token_text(3) for _ in range(2)] == [f"{name}3"] * 2


def test_a_refusal_is_a_not_implemented_error():
    assert issubclass(UnsupportedModelError, NotImplementedError)
    assert issubclass(InputError, ValueError)


def test_something_else_than_a_transformer_lens_model_is_refused():
    with pytest.raises(InputError, match="a HookedTransformer, got a Identity"):
        attribute(torch.nn.Identity(), TOKENS)


def test_a_bridge_in_training_mode_is_refused():
    model = own_bridge_of("gpt2").train()
    with pytest.raises(InputError, match=r"training mode.*eval\(\)"):
        attribute(model, TOKENS)


def test_a_weight_that_is_not_what_the_model_uses_fails_its_identity():
    model = own_bridge_of("gpt2")
    block = model.blocks[1]
    assert attribute(model, TOKENS, top=1) is not None  # verified; hooks are looked at all the same
    # a hook that edits the FFN's output: the neurons no longer add up to it
    edit = (f"blocks.{1}.hook_mlp_out", lambda value, hook: value * 1.5)
    with model.hooks(fwd_hooks=[edit]):
        with pytest.raises(IdentityError, match="FFN neurons fails at layer 1.*off by 0.33"):
            attribute(model, TOKENS)
    assert attribute(model, TOKENS, top=1) is not None  # nothing was left behind
    with torch.no_grad():
        block.mlp.b_out.add_(1.0)  # the model uses it too: every identity still holds
    assert attribute(model, TOKENS, top=1) is not None


def test_a_model_changed_in_place_is_verified_again(monkeypatch):
    model = own_bridge_of("gpt2")
    checks = []

    def counted(*args):
        checks.append(1)
        return identities(*args)

    monkeypatch.setattr("tl_neuron_attr.identities.identities", counted)
    attribute(model, TOKENS, top=1)
    attribute(model, TOKENS, top=1)
    assert len(checks) == 1
    with torch.no_grad():
        model.blocks[0].mlp.W_out.mul_(2)
    attribute(model, TOKENS, top=1)
    assert len(checks) == 2


def scaled(module, _inputs, output):
    return output * 1.5


def with_a_hook_of_torch(model):
    model.original_model.model.layers[1].mlp.down_proj.register_forward_hook(scaled)


def with_another_forward(model):
    down = model.original_model.model.layers[1].mlp.down_proj.original_component
    down.forward = lambda read: 1.5 * read @ down.weight.T


def with_another_cap(model):
    model.original_model.config.final_logit_softcapping = 5.0


@pytest.mark.parametrize(
    ("family", "change", "fails"),
    [
        ("llama", with_a_hook_of_torch, "FFN neurons fails at layer 1.*off by 0.33"),
        ("llama", with_another_forward, "FFN neurons fails at layer 1.*off by 0.33"),
        ("gemma2", with_another_cap, "the read-out fails"),
    ],
)
def test_a_model_that_computes_otherwise_since_it_was_verified_is_verified_again(
    family, change, fails
):
    model = own_bridge_of(family)
    attribute(model, TOKENS, target=9, top=1)
    change(model)
    with pytest.raises(IdentityError, match=fails):
        attribute(model, TOKENS, target=9, top=1)


def test_a_hook_of_torch_that_edits_nothing_is_seen_and_changes_no_score():
    model = own_bridge_of("llama")
    wanted = attribute(model, TOKENS, target=9, top=3).neurons()
    shapes = []
    model.unembed.register_forward_hook(lambda _m, _i, output: shapes.append(output.shape))
    assert has_hooks(model)
    pd.testing.assert_frame_equal(attribute(model, TOKENS, target=9, top=3).neurons(), wanted)
    assert shapes[0][1] == len(TOKENS)  # all positions, as without this package


@pytest.mark.parametrize("family", SUPPORTED)
def test_how_a_model_works_is_no_hook_of_the_callers(family):
    model = own_bridge_of(family)
    assert not has_hooks(model)
    attribute(model, TOKENS, target=9, top=1)
    assert not has_hooks(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_weight_dtypes_are_scored_in_float32_or_wider(dtype):
    wanted = attribute_quietly(bridge_of("llama"))
    found = attribute_quietly(bridge_of("llama", dtype=dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.ffn_neurons.score.dtype == expected
    assert found.host.dtype == dtype
    merged = found.neurons("ffn").merge(wanted.neurons("ffn"), on=["layer", "index"])
    assert merged["score_x"].corr(merged["score_y"]) > 0.99


def test_the_hash_tells_weights_apart_and_only_weights():
    one, same, other = bridge_of("gpt2"), bridge_of("gpt2"), bridge_of("gpt2", seed=1)
    hashes = [weights_hash(open_host(model)) for model in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_cache_or_capture_of_other_weights_is_found_out():
    model, other = bridge_of("gpt2"), bridge_of("gpt2", seed=1)
    attribute(model, TOKENS, top=1)
    foreign = attribute(other, TOKENS, top=1).captured
    with pytest.raises(IdentityError, match="other weights"):
        attribute(model, foreign)
    with torch.no_grad():
        _, cache = other.run_with_cache(torch.tensor([TOKENS]))
    with pytest.raises(IdentityError, match="other weights"):
        attribute(model, TOKENS, cache=cache)
    with pytest.raises(InputError, match="activations are of another model"):
        attribute(bridge_of("llama"), foreign)


def test_part_of_a_bridge_in_training_mode_is_found_too():
    model = own_bridge_of("gpt2")
    model.blocks[0].train()
    assert not model.training
    with pytest.raises(InputError, match="training mode"):
        attribute(model, TOKENS)


def test_an_autocast_around_the_call_changes_nothing(tiny_model):
    wanted = attribute(tiny_model, TOKENS, top=5).neurons()
    with torch.autocast("cpu", torch.bfloat16):
        found = attribute(tiny_model, TOKENS, top=5).neurons()
    assert found.equals(wanted)


def test_products_are_of_full_precision_and_the_callers_choice_is_back_afterwards():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_run_from_a_later_layer_on_leaves_a_forward_that_others_put_there():
    """As accelerate does, to bring a block's inputs to its device."""
    model = own_bridge_of("gpt2")
    real = model.blocks[0].forward
    own = vars(model.blocks[0])["forward"] = lambda *given, **options: real(*given, **options)
    host, tokens = open_host(model), torch.tensor([TOKENS])
    with torch.no_grad(), block_outputs(host) as outputs:
        wanted = model(tokens)
    with torch.no_grad(), starting_at(host, 2, outputs, 3):
        found = model(tokens)
    assert found.shape[0] == 3 and torch.allclose(found, wanted.expand_as(found), atol=1e-6)
    assert vars(model.blocks[0])["forward"] is own and "forward" not in vars(model.blocks[1])


def test_inference_mode_and_frozen_weights_will_do():
    model = own_bridge_of("llama")
    wanted = attribute(model, TOKENS, top=5).neurons()
    model.requires_grad_(False)
    with torch.inference_mode():
        assert attribute(model, TOKENS, top=5).neurons().equals(wanted)
    assert attribute(model, TOKENS, top=5).neurons().equals(wanted)


def test_the_unembedding_is_never_copied(any_model):
    result = attribute(any_model, TOKENS, top=1)
    weights = {p.untyped_storage().data_ptr() for p in any_model.parameters()}
    assert result.out.W_U.untyped_storage().data_ptr() in weights
    for ffn, attn in zip(result.ffns, result.attns, strict=True):
        assert ffn.W_out.untyped_storage().data_ptr() in weights
        assert attn.W_O.untyped_storage().data_ptr() in weights


def test_what_is_no_decoder_with_a_final_norm_is_refused():
    class TransformerBridge(torch.nn.Module):
        cfg = type("cfg", (), {"architecture": "T5ForConditionalGeneration"})()

    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration.*'blocks'"):
        open_host(TransformerBridge().eval())
    TransformerBridge.cfg = object()
    with pytest.raises(UnsupportedModelError, match="unknown is not supported.*'blocks'"):
        open_host(TransformerBridge().eval())


def without(part):
    return lambda block: block._modules.pop(part)


def fewer_neurons(block):
    weight = block.mlp.out.original_component.weight
    block.mlp.out.original_component.weight = torch.nn.Parameter(weight[:-2].detach())


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("gpt2", without("attn"), "layer 1 has no 'attn'"),
        ("gpt2", without("mlp"), "layer 1 has no 'mlp'"),
        ("gpt2", lambda block: block.mlp._modules.pop("out"), "layer 1 has no W_out: its neurons"),
        ("gpt2", fewer_neurons, "layer 1 has a W_out of another shape than layer 0"),
        ("gemma3", without("ln1_post"), "some of its layers norm what they write, and others do"),
    ],
)
def test_a_layer_unlike_the_others_is_refused_by_what_it_lacks(family, change, reason):
    model = own_bridge_of(family)
    change(model.blocks[1])
    with pytest.raises(UnsupportedModelError, match=reason):
        open_host(model)


def test_a_layer_norm_on_what_sub_layers_write_is_refused(monkeypatch):
    model = own_bridge_of("gemma3")
    monkeypatch.setattr(model.cfg, "normalization_type", "LN")
    with pytest.raises(UnsupportedModelError, match="a LayerNorm is on the output of each sub-la"):
        open_host(model)


def test_a_weight_whose_rows_are_zeroed_does_not_look_centred():
    assert is_centred(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
    assert not is_centred(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert not is_centred(torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("is_stateful", True, "state-space"),
        ("attention_dir", "bidirectional", "encoder"),
        ("load_in_4bit", True, "quantised"),
        ("is_encoder_decoder", True, "encoder-decoder"),
        ("logit_scale", 0.25, "scaled"),
        ("do_layer_norm_before", False, "post-LayerNorm"),
        ("normalization_type", None, "neither LayerNorm nor RMSNorm"),
        ("attn_only", True, "no FFN"),
    ],
)
def test_a_configuration_that_says_unsupported_is_believed(monkeypatch, field, value, reason):
    model = own_bridge_of("gpt2")
    monkeypatch.setattr(model.cfg, field, value, raising=False)
    with pytest.raises(UnsupportedModelError, match=f"GPT2LMHeadModel.*{reason}"):
        open_host(model)


def test_scores_in_a_narrow_dtype_are_refused(tiny_gpt2):
    with pytest.raises(InputError, match="float32 or torch.float64, not in torch.bfloat16"):
        attribute(tiny_gpt2, TOKENS, dtype=torch.bfloat16)


def test_the_families_cover_every_kind_of_block():
    hosts = {name: open_host(bridge_of(name)) for name in FAMILIES}
    assert {host.norm for host in hosts.values()} == {"layer_norm", "rms_norm"}
    parallel = {name for name, host in hosts.items() if host.parallel}
    assert parallel == {"neox-parallel", "gptj", "phi"}
    assert any(host.n_key_value_heads < host.n_heads for host in hosts.values())
    assert hosts["opt"].d_mlp == 40
