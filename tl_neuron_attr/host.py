"""Whose model: one adapter over both TransformerLens classes.

It knows the layout of weights, as ``architecture.py`` knows kinds of models, and ``hook_points.py``
the names of hooks; no other module does. All three are duck-typed: they import nothing from
TransformerLens, and ask a model for what both classes have. What is believed about a model is
checked against the model's own activations in ``identities.py``.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.architecture import (
    POST_NORM_ONLY,
    architecture_of,
    check_supported,
    folding_of,
    gain_of,
    is_centred,
    logit_scale_of,
    model_name_of,
    n_experts_of,
    post_norm_name,
    soft_cap_of,
    tensor_of,
)
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError, UnsupportedModelError
from tl_neuron_attr.experts import Mixture, mixture_of
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Head, Kind
from tl_neuron_attr.pieces import Matrix


@dataclass(frozen=True, kw_only=True)
class Norm:
    """What a norm multiplies by and adds; ``None`` where it has none, or it was folded."""

    kind: Literal["layer_norm", "rms_norm", "none"]
    """``none``: nothing is normed, what comes in goes out (OLMo 2 in front of its sub-layers)."""
    gain: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None

    __repr__ = brief


@dataclass(frozen=True, kw_only=True)
class Host:
    """A supported TransformerLens model and what it is; weights are read from it, never copied."""

    model: Any
    class_name: str
    """``TransformerBridge`` or ``HookedTransformer``."""
    model_name: str
    architecture: str
    processing: str
    """What was done to the weights after loading: ``raw``, or what was folded."""
    value_biases_folded: bool
    """Whether ``b_V`` was moved into ``b_O``, which changes what attention neurons contribute."""
    norm: Literal["layer_norm", "rms_norm"]
    eps: float
    parallel: bool
    """Attention and FFN read the same residual stream (NeoX, GPT-J), so there is no resid_mid."""
    residual_scale: float
    """What all that a sub-layer writes is multiplied by (Granite); 1 nearly everywhere."""
    logit_scale: float
    """What all logits are multiplied by (Granite); 1 nearly everywhere."""
    soft_cap: float | None
    """Logits z become ``soft_cap * tanh(z / soft_cap)`` (Gemma 2); ``None``: they stay."""
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    """FFN neurons of a layer; in a mixture of experts those of all of them."""
    d_vocab: int
    n_ctx: int
    n_experts: int = 0
    """Experts an FFN chooses from at each position; 0: its FFNs are no mixtures."""
    d_expert: int = 0
    """Neurons of each of these experts."""
    experts_per_position: int = 0
    """How many of them a position is given."""

    __repr__ = brief

    @cached_property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """All weights there were when first asked: walking through the modules takes a while."""
        return tuple(self.model.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.W_U.dtype

    @property
    def device(self) -> torch.device:
        """Where the unembedding is, and with it every capture, every score and every result.

        The layers of a model may be spread over several devices. What is multiplied with a layer's
        weights is multiplied where they are, and what comes of it is brought here.
        """
        return self.W_U.device

    @property
    def input_device(self) -> torch.device:
        """Where token ids go in: where the embedding is."""
        return next(self.model.embed.parameters()).device

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that weights are on, in the order of the model's parts."""
        return tuple(dict.fromkeys(weight.device for weight in self.parameters))

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding as it lies in memory (on the bridge a transposed view; not a copy)."""
        return self.model.W_U.detach()

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"] | None:
        """The unembedding's bias, if the model has one; ``logit_scale`` is in it."""
        return self._beside_unembedding(tensor_of(self.model, "b_U"))

    @property
    def final_gain(self) -> Float[Tensor, " d_model"] | None:
        """The final norm's gain; ``None`` where it was folded into the unembedding.

        ``logit_scale`` is in it, so that logits come out scaled.
        """
        gain = gain_of(self.model.ln_final, self.model.cfg, self.class_name)
        if gain is None and self.logit_scale != 1:
            gain = self.W_U.new_ones(self.d_model)
        return self._beside_unembedding(gain)

    @property
    def final_bias(self) -> Float[Tensor, " d_model"] | None:
        """The final norm's bias (LayerNorm only); ``None`` where absent or folded; likewise."""
        return self._beside_unembedding(tensor_of(self.model.ln_final, "bias", "b"))

    def _beside_unembedding(self, vector: Float[Tensor, " n"] | None) -> Float[Tensor, " n"] | None:
        # the final norm may be on another device, with the last block
        if vector is None:
            return None
        vector = vector.to(self.device)
        return vector if self.logit_scale == 1 else vector * self.logit_scale

    def mixture(self, layer: int) -> Mixture | None:
        """The layer's experts; ``None`` in an FFN that is no mixture of them."""
        if not self.n_experts:
            return None
        return mixture_of(self.model.blocks[layer].mlp, self.architecture)

    def expert_of(self, index: int) -> tuple[int, int] | None:
        """Which expert FFN neuron ``index`` of a layer is in, and its number there.

        The shared expert, if there is one, is the one after the last. ``None``: there are none.
        """
        if not self.n_experts:
            return None
        expert = min(index // self.d_expert, self.n_experts)
        return expert, index - expert * self.d_expert

    def W_out(self, layer: int) -> Float[Matrix, "d_mlp d_model"]:
        """Row k is the subvalue of FFN neuron k."""
        mixture = self.mixture(layer)
        # not model.W_out: that property stacks, and so copies, all layers at each access
        return self.model.blocks[layer].mlp.W_out.detach() if mixture is None else mixture.down

    def b_out(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """The FFN's output bias, which belongs to no neuron."""
        return tensor_of(self.model.blocks[layer].mlp, "b_out")

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Row [h, k] is the subvalue of attention neuron k of head h."""
        return self.model.blocks[layer].attn.W_O.detach()

    def b_O(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """The attention output's bias, which belongs to no neuron."""
        return tensor_of(self.model.blocks[layer].attn, "b_O")

    def W_in(self, layer: int) -> Float[Tensor, "d_model d_mlp"]:
        """Column k is the subkey of FFN neuron k; in a gated FFN that of its up pre-activation."""
        return self._dense(layer).W_in.detach()

    def W_gate(self, layer: int) -> Float[Tensor, "d_model d_mlp"] | None:
        """Column k is the subkey of neuron k's gate pre-activation; ``None`` in a plain FFN."""
        return tensor_of(self._dense(layer), "W_gate")

    def b_in(self, layer: int) -> Float[Tensor, " d_mlp"] | None:
        """What is added to ``W_in``'s product before the activation."""
        if self.class_name == "HookedTransformer" and self.W_gate(layer) is not None:
            return None  # there it is added after the product of gate and up
        return tensor_of(self.model.blocks[layer].mlp, "b_in")

    def b_gate(self, layer: int) -> Float[Tensor, " d_mlp"] | None:
        """What is added to ``W_gate``'s product before the activation."""
        return tensor_of(self.model.blocks[layer].mlp, "b_gate")

    def _dense(self, layer: int) -> Any:
        if self.n_experts:
            raise UnsupportedModelError(
                f"{self.architecture}: an FFN of experts has no W_in and W_gate of its own; its "
                "subkeys are rows of host.ffn_inputs(layer)"
            )
        return self.model.blocks[layer].mlp

    @property
    def gated(self) -> bool:
        """Whether FFN neurons multiply two inputs, ``act(gate) * up``."""
        return bool(self.n_experts) or self.W_gate(0) is not None

    def ffn_inputs(
        self, layer: int
    ) -> dict[str, tuple[Float[Matrix, "d_mlp d_model"], Float[Tensor, " d_mlp"] | None]]:
        """What FFN neurons compute their coefficients from: ``pre``, or ``gate`` and ``up``.

        By its name the subkeys, row k that of neuron k, and what is added to their product with
        what the FFN reads. (In a mixture the product of gate and up still takes the weight of the
        expert, which the router gives.)
        """
        mixture = self.mixture(layer)
        if mixture is not None:
            return {"gate": (mixture.gate, None), "up": (mixture.up, None)}
        W_in, W_gate = self.W_in(layer).T, self.W_gate(layer)
        if W_gate is None:
            return {"pre": (W_in, self.b_in(layer))}
        return {"gate": (W_gate.T, self.b_gate(layer)), "up": (W_in, self.b_in(layer))}

    def W_V(self, layer: int) -> Float[Tensor, "key_value_head d_model d_head"]:
        """Column [g, :, k] is the subkey of attention neuron k of every head of group g."""
        # HookedTransformer repeats grouped heads in W_V, which copies; _W_V is what it stores
        W_V = tensor_of(self.model.blocks[layer].attn, "_W_V", "W_V")
        assert W_V is not None
        return W_V

    def b_V(self, layer: int) -> Float[Tensor, "key_value_head d_head"] | None:
        """What is added to the value vectors."""
        return tensor_of(self.model.blocks[layer].attn, "_b_V", "b_V")

    def attn_norm(self, layer: int) -> Norm:
        """The norm that attention reads the residual stream through."""
        return self._norm(layer, "ln1")

    def ffn_norm(self, layer: int) -> Norm:
        """The norm that the FFN reads the residual stream through (GPT-J's is attention's)."""
        return self._norm(layer, "ln2", "ln1")

    def _norm(self, layer: int, *names: str) -> Norm:
        if self.architecture in POST_NORM_ONLY:
            return Norm(kind="none", gain=None, bias=None)
        parts = dict(self.model.blocks[layer].named_children())
        norm = next((parts[name] for name in names if name in parts), None)
        if norm is None:
            raise UnsupportedModelError(
                f"{self.architecture}: layer {layer} has no {' or '.join(names)}, so it is not "
                "known what its neurons read"
            )
        gain = gain_of(norm, self.model.cfg, self.class_name)
        return Norm(kind=self.norm, gain=gain, bias=tensor_of(norm, "bias", "b"))

    def post_norm(self, layer: int, kind: Kind) -> Norm | None:
        """The norm on what a sub-layer writes, before the residual stream; ``None`` without one."""
        name = post_norm_name(self.model, self.architecture, layer, kind)
        if name is None:
            return None
        norm = getattr(self.model.blocks[layer], name)
        gain = gain_of(norm, self.model.cfg, self.class_name)
        return Norm(kind=self.norm, gain=gain, bias=tensor_of(norm, "bias", "b"))

    def token_text(self, token: int) -> str:
        """How one token reads in a sentence, with its leading space; ``<id>`` without tokenizer."""
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return f"<{token}>"
        # the model may be given another one
        _, texts = self._token_texts.setdefault(id(tokenizer), (tokenizer, {}))
        if token not in texts:
            texts[token] = self._decoded(tokenizer, token)
        return texts[token]

    @cached_property
    def _token_texts(self) -> dict[int, tuple[Any, dict[int, str]]]:
        """Those asked for so far: prompts have many tokens in common, and decoding is slow.

        Each tokenizer is kept beside its texts: while it is, no other has its ``id``.
        """
        return {}

    def _decoded(self, tokenizer: Any, token: int) -> str:
        piece = tokenizer.convert_ids_to_tokens(token)
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if piece is None or "\ufffd" in text:  # part of a character: the raw piece says more
            return piece if piece is not None else f"<{token}>"
        if piece.startswith("\u2581") and not text.startswith(" "):
            return " " + text  # SentencePiece decoders drop the space of a first token
        return text


def open_host(model: Any) -> Host:
    """The adapter for ``model``, after checking that its neurons can be attributed correctly.

    Raises:
        InputError: If ``model`` is not a TransformerLens model; drops activations at random
            because it is in training mode; has weights that are not in memory; or is spread over
            devices otherwise than its forward pass takes it to be.
        UnsupportedModelError: If its architecture is not supported, naming the reason.
    """
    class_name = check_supported(model)
    cfg = model.cfg
    block = model.blocks[0]
    mixture = mixture_of(block.mlp, architecture_of(cfg)) if n_experts_of(cfg) else None
    W_out = block.mlp.W_out if mixture is None else mixture.down
    W_O = block.attn.W_O
    folded_norm, folded_values = folding_of(model, class_name)
    processing = [
        name
        for name, done in (
            ("norms folded", folded_norm),
            ("value biases folded", folded_values),
            ("writing weights centred", is_centred(W_out)),
            ("unembedding centred", is_centred(model.W_U)),
        )
        if done
    ]
    n_heads = int(W_O.shape[0])
    return Host(
        model=model,
        class_name=class_name,
        model_name=model_name_of(cfg),
        architecture=architecture_of(cfg),
        processing=", ".join(processing) or "raw",
        value_biases_folded=folded_values,
        norm="rms_norm" if cfg.normalization_type.startswith("RMS") else "layer_norm",
        eps=float(cfg.eps),
        parallel=bool(cfg.parallel_attn_mlp),
        residual_scale=float(getattr(cfg, "residual_multiplier", None) or 1.0),
        logit_scale=logit_scale_of(model),
        soft_cap=soft_cap_of(cfg),
        n_layers=len(model.blocks),
        n_heads=n_heads,
        n_key_value_heads=int(getattr(cfg, "n_key_value_heads", None) or n_heads),
        d_model=int(W_O.shape[2]),
        d_head=int(W_O.shape[1]),
        d_mlp=int(W_out.shape[0]),  # cfg.d_mlp is wrong on OPT
        d_vocab=int(model.W_U.shape[1]),
        n_ctx=int(cfg.n_ctx),
        n_experts=0 if mixture is None else mixture.n_experts,
        d_expert=0 if mixture is None else mixture.d_expert,
        experts_per_position=0 if mixture is None else mixture.per_position,
    )


def weights_state(host: Host) -> int:
    """A number that changes when weights are edited in place or replaced, in this process.

    Cheap, where ``weights_hash`` reads every byte; it says nothing in another process.
    """
    return hash(
        tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in host.parameters)
    )


def weights_hash(host: Host) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of all weights as the model holds them.

    The same checkpoint gives another hash after folding, or in the other TransformerLens class:
    the scores of attention neurons depend on both. Cost: one pass over the weights.
    """
    digest = hashlib.sha256()
    weights = dict(host.model.state_dict())
    if host.n_experts:  # a bridge's state_dict leaves out what several experts share
        weights |= {f"{name} of the model": each for name, each in host.model.named_parameters()}
    for name, parameter in sorted(weights.items()):
        if not isinstance(parameter, Tensor):
            continue
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_facts(host: Host) -> dict[str, Any]:
    """Which model it is and how it is held, ready for JSON. Cost: that of ``weights_hash``."""
    return {
        "name": host.model_name,
        "architecture": host.architecture,
        "class": host.class_name,
        "processing": host.processing,
        "dtype": str(host.dtype).removeprefix("torch."),
        "sha256": weights_hash(host),
    }


def neuron_basis(host: Host) -> dict[str, str]:
    """What the index of a neuron of each kind counts, in words, ready for JSON."""
    ffn = "mlp.hook_post: act(pre), in a gated FFN act(gate) * up"
    if host.n_experts:
        ffn = (
            f"act(gate) * up times the router's weight, 0 of experts not chosen; {host.n_experts} "
            f"experts of {host.d_expert} neurons one after the other, a shared one last"
        )
    return {
        "ffn": ffn,
        "attn": "pattern * v of one head, one source position, one dimension",
    }


def check_exists(
    host: Host, part: Head | FFNNeuron | AttnNeuron, read_pos: int | None = None
) -> None:
    """Stop where the model has no such head or neuron.

    Raises:
        InputError: Saying what there is; with ``read_pos`` also if the neuron's source position
            is none of a prompt that is read there.
    """
    exists = 0 <= part.layer < host.n_layers
    if isinstance(part, FFNNeuron):
        what = "neuron"
        exists = exists and 0 <= part.index < host.d_mlp
        there_are = f"{host.n_layers} layers of {host.d_mlp} FFN neurons"
    else:
        what = "head"
        exists = exists and 0 <= part.head < host.n_heads
        there_are = f"{host.n_layers} layers of {host.n_heads} heads"
    if isinstance(part, AttnNeuron):
        what = "neuron"
        exists = exists and 0 <= part.index < host.d_head
        there_are += f" of {host.d_head} dimensions"
        if read_pos is not None:
            exists = exists and 0 <= (part.source_pos or 0) <= read_pos
            there_are += f", and source positions are 0 to {read_pos}"
    if not exists:
        raise InputError(f"there is no {what} {part}: the model has {there_are}")


# --- rows that neurons write with -------------------------------------------------------------


def output_weights(host: Host, kind: Kind, layer: int) -> Float[Matrix, "*unit d_model"]:
    """``W_out`` or ``W_O`` of one layer, as the model computes with it: to be written to."""
    return host.W_out(layer) if kind == "ffn" else host.W_O(layer)


def output_bias(host: Host, kind: Kind, layer: int) -> Float[Tensor, " d_model"] | None:
    """``b_out`` or ``b_O`` of one layer, likewise; ``None`` where the model has none.

    A ``HookedTransformer`` shows an absent bias as zeros. Writing there would act, but the model
    would then look as if value biases had been folded into it.
    """
    bias = host.b_out(layer) if kind == "ffn" else host.b_O(layer)
    if bias is None or (host.class_name == "HookedTransformer" and not bias.any()):
        return None
    return bias


# --- what comes out, and how prompts go in -----------------------------------------------------


def final_logits(
    host: Host, unembedded: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch d_vocab"]:
    """The model's logits from what its unembedding gives: scaled and capped where it does so."""
    logits = unembedded if host.logit_scale == 1 else unembedded * host.logit_scale
    if host.soft_cap is None:
        return logits
    return host.soft_cap * torch.tanh(logits / host.soft_cap)


def sliding_window(host: Host, layer: int) -> int | None:
    """How many positions a layer's cache of keys and values keeps at most; ``None``: all."""
    config = getattr(getattr(host.model, "original_model", None), "config", None)
    window = getattr(config, "sliding_window", None)  # HookedTransformer masks, and keeps all
    kinds = getattr(config, "layer_types", None)
    slides = kinds[layer] == "sliding_attention" if kinds else window is not None
    return window if slides else None


def check_left_padding(host: Host) -> None:
    """Stop where a prompt padded on the left would not be run right.

    Raises:
        InputError: For float64 on the bridge. Hugging Face takes the softmax in float32, where
            the float64 number that masks is -inf: a padded position, all of whose sources are
            masked, becomes NaN, and from there everything does.
    """
    if host.class_name != "HookedTransformer" and host.dtype == torch.float64:
        raise InputError(
            "a TransformerBridge in float64 gives NaN for prompts padded on the left; "
            "pad on the right, or run in float32"
        )


def batch_regime(host: Host, n_tokens: int) -> tuple[int, int]:
    """Prompts can share a forward pass if this is the same for their lengths.

    A few models choose their rotary frequencies by the longest prompt of the batch, so that a
    short one beside it would not get the activations it has alone. And where attention slides, a
    position whose whole window is padding gives NaN: lengths must differ by less than a window.
    """
    windows = [sliding_window(host, layer) for layer in range(host.n_layers)]
    narrowest = min((window for window in windows if window), default=None)
    return _rotary_regime(host, n_tokens), n_tokens // narrowest if narrowest else 0


def _rotary_regime(host: Host, n_tokens: int) -> int:
    cfg = host.model.cfg
    if getattr(cfg, "use_dynamic_ntk_rope", False):  # HookedTransformer's Qwen
        return n_tokens if n_tokens > (cfg.train_seq_length or cfg.n_ctx) else 0
    scaling = getattr(cfg, "rope_parameters", None) or {}
    # some models have one set of parameters for each kind of layer
    for kind in (scaling, *scaling.values()):
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            return int(n_tokens > kind["original_max_position_embeddings"])
    return 0
