"""Families whose sub-layers write through a norm or a multiplier, and what all of them must pass.

The oracle shares no code with the package: it reads Hugging Face's own modules, and does in
float64, one neuron at a time, what the method's definition says.
"""

import copy
import warnings
from dataclasses import replace

import family_table
import pytest
import torch
from conftest import (
    FAMILIES,
    HOOKED,
    REFUSED,
    SINCE_4,
    SUPPORTED,
    TOKENS,
    WRITTEN_THROUGH,
    bridge_from,
    bridge_of,
    hugging_face_model,
    leaving_the_random_state,
    needs_hooked_transformer,
)
from test_query import check_sums

from tl_neuron_attr import (
    FFNNeuron,
    InputError,
    attribute,
    attribute_all,
    intervened,
    open_host,
    projection_index,
    scale,
    tokenize,
    zero,
)
from tl_neuron_attr.capture import capture_all
from tl_neuron_attr.captured import load_capture, save_capture
from tl_neuron_attr.identities import identities, subkey_identities
from tl_neuron_attr.projection import project
from tl_neuron_attr.prompts import Prompt
from tl_neuron_attr.scores import neuron_scores
from tl_neuron_attr.topk import subvalues_of

TARGET = 7
ALL = 10_000


@pytest.fixture(scope="module", params=list(WRITTEN_THROUGH))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return bridge_of(family)


@pytest.fixture(scope="module")
def whole(model):
    """Every neuron of the prompt, scored."""
    return attribute(model, TOKENS, target=TARGET, top=ALL)


# --- by definition ----------------------------------------------------------------------------


class Definition:
    """What each neuron writes and is worth, from Hugging Face's modules, in float64."""

    def __init__(self, family):
        class_name, config = SUPPORTED[family]
        self.family = family
        self.hf = hugging_face_model(class_name, config()).double()
        self.cfg = self.hf.config
        self.layers = self.hf.model.layers
        self.seen = {}
        handles = [
            module.register_forward_hook(self._keep(name))
            for name, module in self.hf.named_modules()
        ]
        with torch.no_grad():
            ran = self.hf(torch.tensor([TOKENS]), output_attentions=True)
        for handle in handles:
            handle.remove()
        self.pattern = [each[0, :, -1].double() for each in ran.attentions]
        self.own_log_probs = ran.logits[0, -1].log_softmax(-1)

    def _keep(self, name):
        def hook(module, went_in, came_out):
            came_out = came_out[0] if isinstance(came_out, tuple) else came_out
            self.seen[name] = (went_in[0] if went_in else None, came_out)

        return hook

    def at(self, layer, name, *, out=False):
        """What went into a module of a layer, or came out of it, at every position."""
        return self.seen[f"model.layers.{layer}.{name}"][out][0].double()

    def gain(self, norm):
        weight = norm.weight.detach().double()
        return 1 + weight if self.family.startswith("gemma") else weight

    def rms(self, x):
        return (x.square().mean() + self.cfg.rms_norm_eps).sqrt()

    def written(self, layer, kind, vectors):
        """Parts of a sub-layer's output as they are in the residual stream."""
        if self.family == "granite":
            return vectors * self.cfg.residual_multiplier
        name, module = {
            "attn": ("post_attention_layernorm", "self_attn.o_proj"),
            "ffn": ("post_feedforward_layernorm", "mlp.down_proj"),
        }[kind]
        s = self.rms(self.at(layer, module, out=True)[-1])
        return vectors / s * self.gain(getattr(self.layers[layer], name))

    def ffn_neurons(self, layer):
        m = self.at(layer, "mlp.down_proj")[-1]
        rows = self.layers[layer].mlp.down_proj.weight.detach().double().T
        return self.written(layer, "ffn", m[:, None] * rows)

    def attn_neurons(self, layer):
        """[head, source position, index, d_model]"""
        attn, paid = self.layers[layer].self_attn, self.pattern[layer]
        v = self.at(layer, "self_attn.v_proj", out=True).unflatten(-1, (-1, attn.head_dim))
        v = v.repeat_interleave(len(paid) // v.shape[1], dim=1).transpose(0, 1)
        rows = attn.o_proj.weight.detach().double().T.unflatten(0, (-1, attn.head_dim))
        coefficients = paid[:, :, None] * v
        return self.written(layer, "attn", coefficients[..., None] * rows[:, None])

    def stream(self, layer):
        """What enters a block at the read position; after the last, what leaves it."""
        if layer < len(self.layers):
            return self.seen[f"model.layers.{layer}"][0][0, -1].double()
        return self.seen["model.norm"][0][0, -1].double()

    def log_prob(self, x, target=TARGET):
        gain = self.gain(self.hf.model.norm)
        normed = x / self.rms(self.stream(len(self.layers))) * gain
        logits = normed @ self.hf.lm_head.weight.detach().double().T
        logits = logits / getattr(self.cfg, "logits_scaling", 1.0)
        cap = getattr(self.cfg, "final_logit_softcapping", None)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return logits.log_softmax(-1)[..., target]


@pytest.fixture(scope="module")
def definition(family):
    return Definition(family)


def test_neurons_sum_to_what_each_sub_layer_adds_to_the_stream(definition):
    """The definition itself: linear once the norm is frozen, and the model's own read-out."""
    for layer in range(3):
        attn = definition.attn_neurons(layer).sum((0, 1, 2))
        ffn = definition.ffn_neurons(layer).sum(0)
        wrote = definition.stream(layer + 1) - definition.stream(layer)
        torch.testing.assert_close(attn + ffn, wrote, rtol=0, atol=2e-6)
    own = definition.log_prob(definition.stream(3))
    assert float(own) == pytest.approx(float(definition.own_log_probs[TARGET]), abs=2e-6)


def test_every_score_is_the_definitions(definition, whole):
    assert whole.log_prob == pytest.approx(float(definition.own_log_probs[TARGET]), abs=1e-5)
    wanted = {}
    for layer in range(3):
        attn, ffn = definition.attn_neurons(layer), definition.ffn_neurons(layer)
        base = definition.stream(layer)
        mid = base + attn.sum((0, 1, 2))
        gains = definition.log_prob(base + attn) - definition.log_prob(base)
        for (head, source, index), score in zip(
            torch.cartesian_prod(*map(torch.arange, gains.shape)).tolist(),
            gains.flatten().tolist(),
            strict=True,
        ):
            wanted[layer, head, index, source] = score
        scores = definition.log_prob(mid + ffn) - definition.log_prob(mid)
        wanted |= {(layer, None, index, None): each for index, each in enumerate(scores.tolist())}
        found = whole.layer_scores
        assert float(found.attn[layer]) == pytest.approx(
            float(definition.log_prob(mid) - definition.log_prob(base)), abs=1e-5
        )
        heads = attn.sum((1, 2))
        rises = definition.log_prob(base + heads) - definition.log_prob(base)
        torch.testing.assert_close(whole.head_scores[layer].double(), rises, rtol=0, atol=1e-5)
    found = {}
    for kind in ("ffn", "attn"):
        ranked = getattr(whole, f"{kind}_neurons")
        for neuron, score in zip(ranked.neurons(), ranked.score.tolist(), strict=True):
            place = (getattr(neuron, "head", None), neuron.index)
            found[neuron.layer, *place, getattr(neuron, "source_pos", None)] = score
    assert found.keys() == wanted.keys()
    assert max(abs(found[key] - wanted[key]) for key in wanted) < 1e-5


def test_a_contrast_is_the_definitions(definition, model):
    other = 30
    found = attribute(model, TOKENS, target=TARGET, against=other, top=ALL).ffn_neurons

    def contrast(x):
        return definition.log_prob(x) - definition.log_prob(x, other)

    for layer in range(3):
        mid = definition.stream(layer) + definition.attn_neurons(layer).sum((0, 1, 2))
        wanted = contrast(mid + definition.ffn_neurons(layer)) - contrast(mid)
        here = found.layer == layer
        torch.testing.assert_close(
            found.score[here].double(), wanted[found.index[here]], rtol=0, atol=1e-5
        )


# --- what every family must pass --------------------------------------------------------------


def test_every_identity_holds(model, whole):
    found = identities(whole.host, whole.captured) + subkey_identities(whole.host, whole.captured)
    for identity in found:
        assert identity.error < 5e-6, identity


def test_an_identity_names_what_is_on_the_way(model, whole):
    ffn = next(i for i in identities(whole.host, whole.captured) if "FFN" in i.name)
    assert ("times 0.5" in ffn.equation) == (whole.host.residual_scale == 0.5)
    assert ("own norm" in ffn.equation) == (whole.host.post_norm(0, "ffn") is not None)


def test_a_scale_or_a_coefficient_that_is_off_fails_its_identity(model, whole):
    if whole.captured.ffn_post_scale is None:
        wrong = replace(whole.captured, mlp_post=1.01 * whole.captured.mlp_post)
    else:
        wrong = replace(whole.captured, ffn_post_scale=1.01 * whole.captured.ffn_post_scale)
    failed = [i.name for i in identities(whole.host, wrong) if not i.holds]
    assert failed == ["the FFN neurons"]


def test_the_best_are_those_of_all(model, whole):
    found = attribute(model, TOKENS, target=TARGET, top=12)
    for kind in ("ffn", "attn"):
        ours, theirs = getattr(found, f"{kind}_neurons"), getattr(whole, f"{kind}_neurons")
        assert ours.neurons() == theirs.neurons()[:12]
        torch.testing.assert_close(ours.score, theirs.score[:12], rtol=0, atol=1e-6)
        certificate = ours.certificate
        assert certificate.holds and certificate.applies
        assert certificate.evaluated < certificate.total / 2


def test_query_sources_sum_to_the_true_pre_activation(model):
    check_sums(model)


@pytest.mark.parametrize("kind", ["ffn", "attn"])
def test_intervals_and_tokens_from_the_index_are_those_computed(model, whole, kind, tmp_path):
    index = projection_index(model, tmp_path)
    found = attribute(model, TOKENS, target=TARGET, top=12, index=index)
    ranked = getattr(found, f"{kind}_neurons")
    blocks = found.ffns if kind == "ffn" else found.attns
    row = ranked.index if ranked.head is None else ranked.head * found.host.d_head + ranked.index
    ours = index.tokens(kind, ranked.layer, row, k=3)
    theirs = project(found.out, subvalues_of(blocks, ranked), 3)
    assert torch.equal(ours.top_ids, theirs.top_ids)
    assert torch.equal(ours.bottom_ids, theirs.bottom_ids)
    if found.host.soft_cap is not None:
        with pytest.raises(InputError, match="soft cap"):
            found.intervals(kind)
        assert not found.suppressing_neurons[kind].certificate.applies
        return
    dense = torch.stack([neuron_scores(block, found.out, found.target) for block in blocks])
    between = found.intervals(kind)
    assert ((between.lower <= dense + 1e-6) & (dense <= between.upper + 1e-6)).all()
    lowest = found.suppressing_neurons[kind]
    wanted = dense.flatten().sort().values[:12]
    torch.testing.assert_close(lowest.score, wanted, rtol=0, atol=1e-6)


@pytest.mark.changes("the weights")
def test_zeroing_is_zeroing_the_row_and_is_undone(model, whole):
    neuron = next(each for each in whole.ffn_neurons.neurons() if each.layer == 1)
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        before = model(tokens)
        with intervened(model, zero(neuron)):
            zeroed = model(tokens)
        assert torch.equal(model(tokens), before)
        row = model.blocks[1].mlp.W_out[neuron.index]
        kept = row.clone()
        row.zero_()
        edited = model(tokens)
        row.copy_(kept)
    assert not torch.equal(zeroed, before)
    torch.testing.assert_close(zeroed, edited, rtol=0, atol=1e-5)


def test_a_batch_padded_on_either_side_gives_each_prompts_own_capture(model):
    host = open_host(model)
    asked = [tokenize(host, Prompt(tokens=tokens)) for tokens in (TOKENS, (9, 30), (4,) * 11)]
    alone = [capture_all(host, [prompt])[0] for prompt in asked]
    for side in ("left", "right"):
        for ours, theirs in zip(capture_all(host, asked, padding_side=side), alone, strict=True):
            for name in ("mlp_post", "attn_out", "logits", "attn_post_scale", "ffn_post_scale"):
                value = getattr(theirs, name)
                if value is None:
                    assert getattr(ours, name) is None
                else:
                    torch.testing.assert_close(getattr(ours, name), value, rtol=1e-4, atol=1e-5)


def test_prompts_further_apart_than_a_window_do_not_share_a_pass():
    # else the short one's padding sees padding alone, and Hugging Face makes NaN of that
    model = bridge_of("gemma3")
    short, long = [TOKENS[0]], TOKENS * 2
    together = attribute_all(model, [long, short], target=TARGET, top=5, batch_size=2)
    for found, tokens in zip(together, (long, short), strict=True):
        alone = attribute(model, tokens, target=TARGET, top=5)
        assert found.ffn_neurons.neurons() == alone.ffn_neurons.neurons()
        assert torch.allclose(found.ffn_neurons.score, alone.ffn_neurons.score, atol=2e-6)


def test_a_copy_whose_hooks_fire_in_the_original_is_refused_by_their_name():
    model = bridge_of("granite")
    attribute(model, TOKENS, top=1)
    with pytest.raises(InputError, match="'blocks.0.hook_attn_out' did not fire"):
        attribute(copy.deepcopy(model), TOKENS, top=1)


def test_a_cache_gives_what_a_run_gives(model, whole):
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    found = attribute(model, TOKENS, target=TARGET, top=5, cache=cache)
    torch.testing.assert_close(found.captured.logits, whole.captured.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found.ffn_neurons.score, whole.ffn_neurons.score[:5], rtol=0, atol=1e-6
    )


def test_a_capture_is_read_back_as_it_was(whole, tmp_path):
    save_capture(whole.captured, tmp_path)
    found = load_capture(tmp_path)
    for name in ("attn_post_scale", "ffn_post_scale"):
        ours, theirs = getattr(found, name), getattr(whole.captured, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_weight_dtypes_are_scored_in_float32_or_wider(family, whole, dtype):
    found = attribute(bridge_of(family, dtype=dtype), TOKENS, target=TARGET, top=ALL)
    assert found.ffn_neurons.score.dtype == torch.promote_types(dtype, torch.float32)
    table = found.neurons("ffn").merge(whole.neurons("ffn"), on=["layer", "index"])
    assert len(table) == 120
    assert table["score_x"].corr(table["score_y"]) > (0.99 if dtype == torch.bfloat16 else 0.9999)


def test_a_processed_bridge_gives_the_raw_ones_numbers(family, whole):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = attribute(bridge_of(family, processed=True), TOKENS, target=TARGET, top=ALL)
    assert found.log_prob == pytest.approx(whole.log_prob, abs=1e-5)
    for kind in ("ffn", "attn"):
        table = found.neurons(kind).merge(
            whole.neurons(kind), on=["layer", "head", "index", "source_pos"]
        )
        assert (table["score_x"] - table["score_y"]).abs().max() < 1e-5


def test_positions_cannot_be_told_from_a_cache_that_forgets_them(model):
    def generated(cached):
        with intervened(model, scale(FFNNeuron(0, 3), -4.0, position=5)):
            return model.generate(
                torch.tensor([TOKENS]),
                max_new_tokens=4,
                do_sample=False,
                verbose=False,
                stop_at_eos=False,
                use_past_kv_cache=cached,
            ).tolist()

    if getattr(model.original_model.config, "sliding_window", None) is None:
        assert generated(cached=True) == generated(cached=False)
        return
    with pytest.raises(InputError, match="holds the last 8 at most in layer 0"):
        generated(cached=True)
    assert generated(cached=False)


# --- the table of families --------------------------------------------------------------------


@pytest.mark.skipif(not SINCE_4, reason="the page is of TransformerLens 4")
def test_the_page_on_models_has_the_table_that_models_give():
    page = family_table.PAGE.read_text(encoding="utf-8")
    assert family_table.page_with_tables(page) == page, "run python tests/family_table.py"


def test_every_family_of_the_tests_has_a_row_and_a_name():
    assert family_table.NAMES.keys() == {*SUPPORTED, *REFUSED}
    assert len(family_table.refused_rows()) == len(REFUSED)
    assert {*HOOKED} == {name for name in HOOKED if name in FAMILIES} | HOOKED_CONFIGS.keys()


# --- HookedTransformer ------------------------------------------------------------------------

_LOCAL = dict(use_local_attn=True, window_size=8)
_TWICE = dict(
    n_key_value_heads=2,
    eps=1e-6,
    act_fn="gelu_pytorch_tanh",
    use_normalization_before_and_after=True,
    **_LOCAL,
)
HOOKED_CONFIGS = {
    "gemma2": dict(
        original_architecture="Gemma2ForCausalLM",
        attn_types=["local", "global", "local"],
        attn_scores_soft_cap=2.0,
        output_logits_soft_cap=1.5,
        rotary_base=10_000.0,
        **_TWICE,
    ),
    "gemma3": dict(
        original_architecture="Gemma3ForCausalLM",
        attn_types=["local"] * 3,
        use_qk_norm=True,
        rotary_base=1_000_000.0,
        rotary_base_local=10_000.0,
        **_TWICE,
    ),
    "olmo2": dict(
        original_architecture="Olmo2ForCausalLM",
        attn_types=["global"] * 3,
        eps=1e-5,
        act_fn="silu",
        rotary_base=10_000.0,
    ),
}


@leaving_the_random_state
def hooked_by_hand(family, hf, **processing):
    """Their loader knows these families by official names only; so does nothing of ours."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import (
        convert_gemma_weights,
        convert_olmo2_weights,
    )

    sizes = dict(d_model=24, d_head=6, n_heads=4, d_mlp=40, n_layers=3, n_ctx=32, d_vocab=61)
    cfg = HookedTransformerConfig(
        **sizes,
        **HOOKED_CONFIGS[family],
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=6,
        gated_mlp=True,
        final_rms=True,
        device="cpu",
    )
    convert = convert_olmo2_weights if family == "olmo2" else convert_gemma_weights
    plain = dict(
        fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedTransformer(cfg)
        model.load_and_process_state_dict(convert(hf, cfg), **{**plain, **processing})
    return model


@needs_hooked_transformer
@pytest.mark.parametrize(
    ("kind", "fold_ln"),
    [("gemma2", False), ("gemma2", True), ("gemma3", False), ("gemma3", True), ("olmo2", False)],
)
def test_hooked_transformer_gives_the_bridges_numbers(kind, fold_ln):
    class_name, config = SUPPORTED[kind]
    config = config()
    if kind == "olmo2":  # their conversion knows no groups
        config.num_key_value_heads = 4
    wanted = attribute(bridge_from(class_name, config), TOKENS, target=TARGET, top=ALL)
    with torch.random.fork_rng():
        hf = hugging_face_model(class_name, config)
    model = hooked_by_hand(kind, hf, fold_ln=fold_ln)
    found = attribute(model, TOKENS, target=TARGET, top=ALL)
    assert found.host.class_name == "HookedTransformer"
    assert found.host.processing == ("norms folded" if fold_ln else "raw")
    assert found.log_prob == pytest.approx(wanted.log_prob, abs=1e-5)
    key = ["kind", "layer", "head", "index", "source_pos"]
    table = found.neurons().merge(wanted.neurons(), on=key)
    assert len(table) == len(found.neurons())
    assert (table["score_x"] - table["score_y"]).abs().max() < 1e-5
    check_sums(model)
