"""The shapes of a model, from its configuration or from the model: what its costs follow from."""

from dataclasses import dataclass
from typing import Any

from tl_neuron_attr.errors import InputError, UnsupportedModelError
from tl_neuron_attr.host import Host

# Where configurations keep each shape; the first name that holds a number counts.
_SPELLINGS = {
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "n_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "n_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "d_head": ("head_dim", "d_head"),
    "d_mlp": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "d_vocab": ("vocab_size",),
    "n_ctx": ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"),
}

# Families whose FFN is gated, or whose blocks are parallel, though no setting of theirs says so.
_GATED = frozenset({"gemma", "gemma2", "gemma3_text"})

_PARALLEL = frozenset({"gptj", "phi", "codegen", "cohere"})

# Mixtures of experts whose neurons are known.
_MIXTURES = frozenset({"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The sizes that all costs follow from, under the names of ``Host``."""

    family: str
    """The configuration's ``model_type``."""
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int | None
    """The longest prompt; ``None`` where the configuration sets no limit."""
    parallel: bool
    """Attention and FFN read the same residual stream."""
    gated: bool
    """The FFN multiplies two projections, so it has three matrices."""
    tied: bool
    """The unembedding is the embedding, transposed."""
    capped: bool
    """Logits go through a soft cap (Gemma 2)."""
    activation: str
    """Of the FFN, as the configuration calls it."""
    d_off: int = 0
    """FFN neurons of a layer whose experts a position is not given; no mixture: 0."""

    @property
    def d_on(self) -> int:
        """FFN neurons of a layer that a position goes through: no others are computed or scored."""
        return self.d_mlp - self.d_off

    @property
    def n_subvalues(self) -> int:
        """Rows of ``W_out`` and ``W_O`` in all layers."""
        return self.n_layers * (self.d_mlp + self.n_heads * self.d_head)

    def n_neurons(self, n_tokens: int) -> tuple[int, int]:
        """FFN neurons, and attention neurons by source position, of a prompt of this length.

        Of a mixture of experts those of the experts that are on: all others score 0."""
        return (
            self.n_layers * self.d_on,
            self.n_layers * self.n_heads * n_tokens * self.d_head,
        )

    @property
    def n_block_weights(self) -> int:
        """Weights of the matrices in all layers."""
        return self.n_used_weights + self.n_layers * 3 * self.d_off * self.d_model

    @property
    def n_used_weights(self) -> int:
        """Those that one position is multiplied with."""
        attention = 2 * (self.n_heads + self.n_key_value_heads) * self.d_head * self.d_model
        return self.n_layers * (attention + (3 if self.gated else 2) * self.d_on * self.d_model)


def shapes_of(config: Any) -> Shapes:
    """The shapes a Hugging Face configuration describes, however its family spells them.

    Raises:
        InputError: If it lacks one, naming it.
        UnsupportedModelError: For an encoder-decoder, or experts whose router is not known.
    """
    family = str(getattr(config, "model_type", "") or type(config).__name__)
    mixture = _mixture(config, family)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{family} is not supported: it is an encoder-decoder")
    found = {name: _number(config, *spellings) for name, spellings in _SPELLINGS.items()}
    if mixture is not None:
        found["d_mlp"] = mixture[0]
    unsaid = family == "bloom" or any(hasattr(config, name) for name in _SPELLINGS["d_mlp"])
    if found["d_mlp"] is None and unsaid:
        found["d_mlp"] = 4 * (found["d_model"] or 0)  # what None stands for
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        found["n_key_value_heads"] = 1
    missing = [
        name for name in ("n_layers", "n_heads", "d_model", "d_mlp", "d_vocab") if not found[name]
    ]
    if missing:
        raise InputError(
            f"the configuration {family!r} lacks {', '.join(missing)} under any name known here; "
            "give a Hugging Face configuration of a decoder, a model's name, or a loaded model"
        )
    sizes = {name: value or 0 for name, value in found.items() if name != "n_ctx"}
    sizes["d_head"] = sizes["d_head"] or sizes["d_model"] // sizes["n_heads"]
    sizes["n_key_value_heads"] = sizes["n_key_value_heads"] or sizes["n_heads"]
    activation = _activation(config)
    gated = activation in ("silu", "swish") or family in _GATED or mixture is not None
    return Shapes(
        family=family,
        **sizes,
        n_ctx=found["n_ctx"],
        parallel=bool(
            getattr(config, "use_parallel_residual", False)
            or getattr(config, "parallel_attn", False)
            or family in _PARALLEL
        ),
        gated=gated,
        activation=activation,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        capped=bool(getattr(config, "final_logit_softcapping", None)),
        d_off=0 if mixture is None else mixture[1],
    )


def shapes_of_host(host: Host) -> Shapes:
    """Those of an open model."""
    model = host.model
    config = getattr(getattr(model, "original_model", None), "config", None)
    family = str(getattr(config, "model_type", None) or host.architecture)
    gated = bool(getattr(model.cfg, "gated_mlp", False))
    return Shapes(
        family=family,
        n_layers=host.n_layers,
        n_heads=host.n_heads,
        n_key_value_heads=host.n_key_value_heads,
        d_model=host.d_model,
        d_head=host.d_head,
        d_mlp=host.d_mlp,
        d_vocab=host.d_vocab,
        n_ctx=host.n_ctx,
        parallel=host.parallel,
        gated=gated,
        activation=_activation(config) or str(getattr(model.cfg, "act_fn", "")),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        capped=host.soft_cap is not None,
        d_off=(host.n_experts - host.experts_per_position) * host.d_expert,
    )


def _mixture(config: Any, family: str) -> tuple[int, int] | None:
    """Neurons of a layer of experts, and how many of them are off; ``None``: it is no mixture."""
    n_experts = _number(config, "num_local_experts", "num_experts", "n_routed_experts")
    if not n_experts:
        return None
    if family not in _MIXTURES:
        raise UnsupportedModelError(
            f"{family} is not supported: its FFN is a mixture of experts whose router is not "
            f"known; those of {', '.join(sorted(_MIXTURES))} are"
        )
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) > 1:
        raise UnsupportedModelError(
            f"{family} is not supported as it is here: some of its layers have a mixture of "
            "experts, and others do not"
        )
    d_expert = _number(config, "moe_intermediate_size", "intermediate_size") or 0
    d_shared = (_number(config, "shared_expert_intermediate_size") or 0) * (family == "qwen2_moe")
    off = n_experts - (_number(config, "num_experts_per_tok") or n_experts)
    return n_experts * d_expert + d_shared, off * d_expert


def _activation(config: Any) -> str:
    names = ("hidden_act", "activation_function", "hidden_activation")
    return next((str(getattr(config, name)) for name in names if getattr(config, name, None)), "")


def _number(config: Any, *names: str) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
