"""Tiny seeded random models of both TransformerLens classes, and where the shared material is."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import functools
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
import torch
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_neuron_attr.state import (
    changed,
    model_state,
    random_states,
    torch_modes,
    weights_digest,
)

try:  # gone in TransformerLens 4: its module __getattr__ raises ImportError
    from transformer_lens import HookedTransformer
except ImportError:
    HookedTransformer = None

# tiny models: a second thread costs more than it brings
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"
TOKENS = (3, 17, 5, 40, 8, 22)

_SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
_ROTARY = dict(vocab_size=61, max_position_embeddings=32, **_SIZES)
_GROUPED = dict(num_key_value_heads=2, **_ROTARY)
_OPT = dict(
    vocab_size=61,
    hidden_size=24,
    ffn_dim=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=32,
    word_embed_proj_dim=24,
)
_GPT2 = dict(vocab_size=61, n_embd=24, n_head=3, n_layer=3, n_positions=32)

# Family -> (Hugging Face class, configuration). Every kind of block that is supported.
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", lambda: transformers.GPT2Config(**_GPT2, n_ctx=32)),
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**_GROUPED)),
    "mistral": ("MistralForCausalLM", lambda: transformers.MistralConfig(**_GROUPED, head_dim=6)),
    "qwen2": ("Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**_GROUPED)),
    "qwen3": ("Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8)),
    "phi3": ("Phi3ForCausalLM", lambda: transformers.Phi3Config(**_GROUPED, pad_token_id=0)),
    "opt": ("OPTForCausalLM", lambda: transformers.OPTConfig(**_OPT)),
    "neox": (
        "GPTNeoXForCausalLM",
        lambda: transformers.GPTNeoXConfig(**_ROTARY, use_parallel_residual=False),
    ),
    "neox-parallel": (
        "GPTNeoXForCausalLM",
        lambda: transformers.GPTNeoXConfig(**_ROTARY, use_parallel_residual=True),
    ),
    "gptj": (
        "GPTJForCausalLM",
        lambda: transformers.GPTJConfig(**_GPT2, rotary_dim=4, n_ctx=32),
    ),
}

# Kinds of block beyond the first ten: no value bias, ALiBi, multi-query, gain stored less 1.
FAMILIES |= {
    "neo": (
        "GPTNeoForCausalLM",
        lambda: transformers.GPTNeoConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            num_layers=3,
            num_heads=4,
            max_position_embeddings=32,
            attention_types=[[["global", "local", "global"], 1]],
            window_size=8,
        ),
    ),
    "bloom": (
        "BloomForCausalLM",
        lambda: transformers.BloomConfig(vocab_size=61, hidden_size=24, n_layer=3, n_head=4),
    ),
    "phi": ("PhiForCausalLM", lambda: transformers.PhiConfig(**_ROTARY)),
    "starcoder2": ("Starcoder2ForCausalLM", lambda: transformers.Starcoder2Config(**_GROUPED)),
    "bigcode": (
        "GPTBigCodeForCausalLM",
        lambda: transformers.GPTBigCodeConfig(**{**_GPT2, "n_head": 4}, n_inner=40),
    ),
    "gemma": ("GemmaForCausalLM", lambda: transformers.GemmaConfig(**_GROUPED, head_dim=6)),
}

# Families whose sub-layers write through a norm or a multiplier, and one that caps its logits. The
# multipliers and the cap are strong enough to be missed at once.
_GRANITE = dict(
    residual_multiplier=0.5, embedding_multiplier=3.0, logits_scaling=0.4, attention_multiplier=0.3
)
_GEMMA = dict(head_dim=6, query_pre_attn_scalar=6, sliding_window=8, **_GROUPED)
WRITTEN_THROUGH = {
    "granite": (
        "GraniteForCausalLM",
        lambda: transformers.GraniteConfig(**_GROUPED, **_GRANITE),
    ),
    "olmo2": ("Olmo2ForCausalLM", lambda: transformers.Olmo2Config(**_GROUPED)),
    "gemma3": ("Gemma3ForCausalLM", lambda: transformers.Gemma3TextConfig(**_GEMMA)),
    "gemma2": (
        "Gemma2ForCausalLM",
        lambda: transformers.Gemma2Config(
            **_GEMMA, final_logit_softcapping=1.5, attn_logit_softcapping=2.0
        ),
    ),
}

# Families whose FFN is a mixture of experts: with the chosen weights summing to 1 or not, with an
# expert that all positions go through, with one expert chosen or several.
_QWEN2_MOE = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
    **_GROUPED,
)
MIXTURES = {
    "mixtral": (
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=4),
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        lambda: transformers.OlmoeConfig(**_GROUPED, num_experts=8, num_experts_per_tok=2),
    ),
    "qwen2moe": ("Qwen2MoeForCausalLM", lambda: transformers.Qwen2MoeConfig(**_QWEN2_MOE)),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(
            **_GROUPED,
            num_experts=4,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            moe_intermediate_size=16,
            head_dim=6,
        ),
    ),
}

# Families that TransformerLens 3.9 runs wrongly.
_COHERE = ("CohereForCausalLM", lambda: transformers.CohereConfig(**_GROUPED, logit_scale=0.4))
SINCE_4 = {"cohere": _COHERE} if HookedTransformer is None else {}
SUPPORTED = FAMILIES | WRITTEN_THROUGH | MIXTURES | SINCE_4

# Families that must be refused, with a word of the reason.
REFUSED = {
    "qwen2moe-mixed": (
        "Qwen2MoeForCausalLM",
        lambda: transformers.Qwen2MoeConfig(**_QWEN2_MOE, mlp_only_layers=[1]),
        "equally many",
    ),
    "opt-post": (
        "OPTForCausalLM",
        lambda: transformers.OPTConfig(**_OPT, do_layer_norm_before=False),
        "post-LayerNorm",
    ),
}
if not SINCE_4:
    REFUSED["cohere"] = (*_COHERE, "rotates its queries")

MIXTURE_CLASSES = {class_name for class_name, _ in MIXTURES.values()}

# Families that are tested as HookedTransformer too, number for number against the bridge.
HOOKED = (
    *("gpt2", "llama", "mistral", "qwen2", "neox-parallel", "gptj"),
    *("gemma2", "gemma3", "olmo2"),
)


def hugging_face_model(class_name, config, seed=0, scale=0.15):
    """A model with every weight random: norms off 1, biases off 0, predictions not flat."""
    config._attn_implementation = "eager"
    hugging_face_class = getattr(transformers, class_name)
    hf = hugging_face_class._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(scale * noise)
    return hf


def leaving_the_random_state(build):
    """Building a model draws initial weights; a test that builds one must not look as if it did."""

    @functools.wraps(build)
    def wrapped(*args, **kwargs):
        with torch.random.fork_rng():
            return build(*args, **kwargs)

    return wrapped


@leaving_the_random_state
def bridge_of(family, *, processed=False, dtype=torch.float32, seed=0):
    """A TransformerBridge of one family, its weights raw or folded."""
    class_name, config, *_ = {**SUPPORTED, **REFUSED}[family]
    return bridge_from(class_name, config(), processed=processed, dtype=dtype, seed=seed)


@leaving_the_random_state
def bridge_from(class_name, config, *, processed=False, dtype=torch.float32, seed=0):
    """A TransformerBridge of a Hugging Face class and configuration."""
    hf = hugging_face_model(class_name, config, seed).to(dtype)
    if class_name in MIXTURE_CLASSES and dtype == torch.float64:
        hf.set_experts_implementation("eager")  # the others know no float64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = build_bridge_from_module(
            hf, class_name, hf_config=config, dtype=dtype, device="cpu"
        ).eval()
        if processed:
            bridge.enable_compatibility_mode()
    return bridge


@leaving_the_random_state
def hooked_of(family, *, processed=False, fold_value_biases=None, seed=0):
    """A HookedTransformer with the very weights of ``bridge_of`` (TransformerLens 3.9)."""
    import transformer_lens.loading_from_pretrained as loading

    class_name, config, *_ = FAMILIES[family]
    hf = hugging_face_model(class_name, config(), seed)
    rms = hf.config.__class__.__name__ in ("LlamaConfig", "MistralConfig", "Qwen2Config")
    # the loader recognises families by their directory's name, and some names mislead it
    with tempfile.TemporaryDirectory(prefix="host-") as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf.save_pretrained(directory)
        cfg = loading.get_pretrained_model_config(
            directory, hf_cfg=hf.config.to_dict(), fold_ln=processed, device="cpu"
        )
        cfg.tokenizer_name = None
        state = loading.get_pretrained_state_dict(directory, cfg, hf_model=hf)
        model = HookedTransformer(cfg)
        model.load_and_process_state_dict(
            state,
            fold_ln=processed,
            center_writing_weights=processed and not rms,
            center_unembed=processed,
            fold_value_biases=processed if fold_value_biases is None else fold_value_biases,
        )
    return model


needs_hooked_transformer = pytest.mark.skipif(
    HookedTransformer is None, reason="HookedTransformer was removed in TransformerLens 4"
)


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def tiny_model(request):
    """One GPT-2-like model (biases, LayerNorm), one Llama-like (gated, RMSNorm, grouped heads)."""
    return bridge_of(request.param)


@pytest.fixture(scope="session")
def tiny_gpt2():
    return bridge_of("gpt2")


@pytest.fixture(scope="session", params=list(FAMILIES))
def any_model(request):
    """One model of each supported family."""
    return bridge_of(request.param)


_MODELS = ("tiny_model", "tiny_gpt2", "any_model")
_DIGESTED = 20  # every so many uses of a model all its weights are read


@contextmanager
def watched(*models):
    """Fails at its end if something of ``models``, of torch's modes or random numbers changed."""
    before = [model_state(model) for model in models]
    digests = [_digest_now_and_then(model) for model in models]
    modes, numbers = torch_modes(), random_states()
    yield
    left = [*changed(modes, torch_modes()), *changed(numbers, random_states())]
    for model, state, digest in zip(models, before, digests, strict=True):
        left += changed(state, model_state(model))
        if digest is not None and weights_digest(model) != digest:
            left.append("the bytes of the weights")
    assert not left, f"the test changed {', '.join(left)}"


@pytest.fixture(autouse=True)
def all_is_left_alone(request):
    """After every test, whatever it raised on the way: models, torch's modes, random numbers.

    Of each model that fixtures share: weights, hooks, flags, training mode, gradients. Edits are
    known by torch's count of them; those behind its back by a hash, now and then.
    """
    shared = [name for name in _MODELS if name in request.fixturenames]
    with watched(*map(request.getfixturevalue, shared)):
        yield


_uses: WeakKeyDictionary = WeakKeyDictionary()


def _digest_now_and_then(model):
    _uses[model] = _uses.get(model, -1) + 1
    return weights_digest(model) if _uses[model] % _DIGESTED == 0 else None


def count_forward_passes(model, monkeypatch):
    """A list that grows by one with each forward pass from now on."""
    passes = []
    real = model.run_with_hooks

    def counted(*arguments, **options):
        passes.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(model, "run_with_hooks", counted)
    return passes
