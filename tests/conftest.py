"""Tiny seeded random models of both TransformerLens classes, and where the shared material is."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# tiny models: a second thread costs more than it brings, here and in processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import gc
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary, WeakSet

import jaxtyping
import pytest
import shape_checks  # before the package
import torch
import transformers
from hypothesis import HealthCheck, settings
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_neuron_attr import models
from tl_neuron_attr.cli import options
from tl_neuron_attr.host import Host
from tl_neuron_attr.methods import conformance
from tl_neuron_attr.runs import run as runs_run
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

torch.set_num_threads(1)

# How many examples a property is tried on; no test chooses for itself. Those of ``ci`` are the
# same every time, so that a change is to blame for what fails; ``nightly`` draws new ones. That the
# machine is busy is no fault of a test's.
_PATIENT = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", max_examples=50, derandomize=True, **_PATIENT)
settings.register_profile("nightly", max_examples=1000, derandomize=False, **_PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

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
    shared_expert_intermediate_size=20,
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
    "olmoe-clipped": (
        "OlmoeForCausalLM",
        lambda: transformers.OlmoeConfig(
            **_GROUPED, num_experts=8, num_experts_per_tok=2, clip_qkv=0.1
        ),
        "clips its value vectors",
    ),
    "opt-post": (
        "OPTForCausalLM",
        lambda: transformers.OPTConfig(**_OPT, do_layer_norm_before=False),
        "post-LayerNorm",
    ),
}
if not SINCE_4:
    REFUSED["cohere"] = (*_COHERE, "rotates its queries")


def slow(*names):
    """What ``.ci/run`` repeats a test for, and the default run does not."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


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


def bridge_of(family, *, processed=False, dtype=torch.float32, seed=0):
    """A TransformerBridge of one family, its weights raw or folded: one for all tests.

    A test that changes the model it asks for takes ``own_bridge_of``.
    """
    return _shared_bridge(family, processed, dtype, seed)


@functools.cache
@torch.inference_mode(False)
def _shared_bridge(family, processed, dtype, seed):
    return shared(own_bridge_of(family, processed=processed, dtype=dtype, seed=seed))


def own_bridge_of(family, *, processed=False, dtype=torch.float32, seed=0):
    """The same, for one test alone, which may do with it what it likes."""
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


def hooked_of(family, *, processed=False, fold_value_biases=None, seed=0):
    """A HookedTransformer with the very weights of ``bridge_of``, one for all tests (3.9)."""
    return _shared_hooked(family, processed, fold_value_biases, seed)


@functools.cache
@torch.inference_mode(False)
def _shared_hooked(family, processed, fold_value_biases, seed):
    options = dict(processed=processed, fold_value_biases=fold_value_biases, seed=seed)
    return shared(own_hooked_of(family, **options))


@leaving_the_random_state
def own_hooked_of(family, *, processed=False, fold_value_biases=None, seed=0):
    """The same, for one test alone."""
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


@functools.cache
@torch.inference_mode(False)
def bundled_model(**options):
    """The bundled model, loaded once: the commands and runs of all tests are given it too."""
    return shared(models.load_model("tiny-facts", **options))


def _load_once(name="tiny-facts", **options):
    if name != "tiny-facts" or options.get("device", "cpu") not in (None, "cpu"):
        return models.load_model(name, **options)
    dtype = models.weight_dtype(options.get("dtype", "float32"))
    return bundled_model() if dtype == torch.float32 else bundled_model(dtype=dtype)


@pytest.fixture(autouse=True, scope="session")
def the_bundled_model_is_loaded_once():
    """By whoever asks for it by its name; ``models.load_model`` itself loads it anew."""
    with pytest.MonkeyPatch.context() as patch:
        for asking in (options, runs_run, conformance):
            patch.setattr(asking, "load_model", _load_once)
        yield


needs_hooked_transformer = pytest.mark.skipif(
    HookedTransformer is None, reason="HookedTransformer was removed in TransformerLens 4"
)


# not of the session: pytest would then sort the tests of all files by model, and what a file's own
# fixtures made would be made again and again


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tiny_model(request):
    """One GPT-2-like model (biases, LayerNorm), one Llama-like (gated, RMSNorm, grouped heads)."""
    return bridge_of(request.param)


@pytest.fixture(scope="module")
def tiny_gpt2():
    return bridge_of("gpt2")


@pytest.fixture(scope="module", params=list(FAMILIES))
def any_model(request):
    """One model of each supported family."""
    return bridge_of(request.param)


@pytest.fixture(scope="module")
def few_cards():
    """A report has the card of one neuron of each list: a card takes longer than an attribution.

    For tests of what is around them; ``test_report`` and ``test_report_browser`` have all.
    """
    real = sys.modules["tl_neuron_attr.report.cards"].best_cards

    def few(result, saved, count=1):
        return real(result, saved, min(count, 1))

    with pytest.MonkeyPatch.context() as patch:
        for place in ("attribution", "prompt_set"):
            patch.setattr(sys.modules[f"tl_neuron_attr.report.{place}"], "best_cards", few)
        yield


@pytest.fixture(scope="module")
def pages_undrawn(few_cards):
    """``attribute --out`` and ``query --out`` write tables, facts and pages with nothing on them.

    To draw a page takes many times as long as what is on it. For tests of the tables, the facts and
    the screen; ``test_report`` and ``test_pages`` draw both pages, from the same commands.
    """
    with pytest.MonkeyPatch.context() as patch:
        report = sys.modules["tl_neuron_attr.report.attribution"]
        patch.setattr(report, "report_html", lambda saved, cards=(), **_: "<!doctype html>")
        patch.setattr(report, "best_cards", lambda result, saved, count=0: [])
        query = sys.modules["tl_neuron_attr.cli.query"]
        patch.setattr(query, "query_page", lambda saved: "<!doctype html>")
        yield


def pytest_collection_finish():
    """What the libraries made at their import stays: it need not be searched again and again."""
    gc.collect()
    gc.freeze()


# --- what every test leaves alone -------------------------------------------------------------

BYTES = "the bytes of the weights"
_MOST = 2**23  # weights beyond this many bytes are watched by torch's count of their edits alone


def look_at(model):
    """All of a model that no public call may change: its state, and a hash of what it holds.

    Edits are known by torch's count of them; those that go behind its back by the hash.
    """
    held = (*model.parameters(), *model.buffers())
    small = sum(tensor.nbytes for tensor in held) < _MOST and not any(t.is_meta for t in held)
    return {**model_state(model), BYTES: weights_digest(model) if small else None}


class Watched:
    """What each model that the package was given looked like when a test was last done with it."""

    def __init__(self):
        self.looks = WeakKeyDictionary()
        self.given = WeakSet()

    def give(self, model):
        """The package gets to see a model."""
        if model not in self.looks:
            self.looks[model] = look_at(model)
        self.given.add(model)

    def changed(self):
        """What changed of all models that were given since the last time."""
        left = []
        for model in list(self.given):
            before, self.looks[model] = self.looks[model], look_at(model)
            shared = " of a model for all tests" if model in SHARED_MODELS else ""
            for what in changed(before, self.looks[model]):
                # edited and put back it is as it was: the hash sees to that
                left.append(what if what == "the weights" else what + shared)
        self.given.clear()
        return left


SHARED_MODELS = WeakSet()
WATCHED = Watched()


def shared(model):
    """A model that no test may leave changed, whatever it says of itself."""
    SHARED_MODELS.add(model)
    return model


@pytest.fixture(autouse=True, scope="session")
def every_model_is_watched():
    """From the moment on that the package opens it, whoever made or loaded it."""
    opened = Host.__init__

    def opening(host, *arguments, **facts):
        opened(host, *arguments, **facts)
        WATCHED.give(host.model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Host, "__init__", opening)
        yield


@contextmanager
def watched(*given, except_for=()):
    """Fails at its end if something of a model, of torch's modes or of random numbers changed.

    Of ``given`` and of every model that the package opens inside. ``except_for``: what is meant to.
    """
    for model in given:
        WATCHED.give(model)
    modes, numbers = torch_modes(), random_states()
    yield
    left = [*changed(modes, torch_modes()), *changed(numbers, random_states())]
    left += WATCHED.changed()
    left = [what for what in dict.fromkeys(left) if what not in except_for]
    assert not left, f"the test changed {', '.join(left)}"


@pytest.fixture(autouse=True)
def all_is_left_alone(request):
    """After every test, whatever it raised on the way: models, torch's modes, random numbers.

    Of each model that the package was given: weights, hooks, flags, training mode, gradients. A
    test that changes one itself says what: ``@pytest.mark.changes("the weights")``.
    """
    shape_checks.begin_test(request.node.nodeid.partition("::")[0])
    own = [what for mark in request.node.iter_markers("changes") for what in mark.args]
    with watched(except_for=own):
        yield
        # results of fixtures hold models opened before
        for value in request.node.funcargs.values():
            model = getattr(getattr(value, "host", None), "model", value)
            if isinstance(model, torch.nn.Module) and model in WATCHED.looks:
                WATCHED.given.add(model)


@pytest.fixture
def unchecked():
    """Types go unchecked in the test, as they do for users: what is a wrong one answered with?"""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def count_forward_passes(model, monkeypatch):
    """A list that grows by one with each forward pass from now on."""
    passes = []
    real = model.run_with_hooks

    def counted(*arguments, **options):
        passes.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(model, "run_with_hooks", counted)
    return passes
