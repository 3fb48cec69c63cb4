"""Whose model: one adapter over both TransformerLens classes.

The only module that knows hook names, weight layout and architectures. It is duck-typed: it
imports nothing from TransformerLens, and asks a model only for ``cfg``, ``blocks``, ``ln_final``,
``W_U``, ``b_U``, its tokenizer and ``run_with_hooks``. What it believes about a model is checked
against the model's own activations in ``identities.py``.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, SupportsIndex, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError, UnsupportedModelError
from tl_neuron_attr.experts import KNOWN, Mixture, has_experts, mixture_of
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Head, Kind
from tl_neuron_attr.pieces import Matrix, blocks_of
from tl_neuron_attr.prompts import Prompt, Target, TokenizedPrompt, integer
from tl_neuron_attr.tiny_facts import tiny_facts_dir

# Families without a value bias whose attention output has one: zeros there mean that nothing was
# folded, unless the norms were, which makes value biases. (HookedTransformer shows an absent bias
# as zeros, so names are all there is.)
_WITHOUT_VALUE_BIAS = frozenset({"GPTNeoForCausalLM"})

# Families whose bridge calls the hook of the attention pattern after those of z and the output.
_LATE_PATTERN = frozenset({"GPTJForCausalLM", "GPTNeoForCausalLM", "OPTForCausalLM"})

# Families that norm what each sub-layer writes and nothing it reads. TransformerLens 3.9 calls
# these norms ln1 and ln2, as it calls those in front of a sub-layer elsewhere.
_POST_NORM_ONLY = frozenset({"Olmo2ForCausalLM", "Olmo3ForCausalLM"})

# Families whose Hugging Face module holds the number that it multiplies its logits by.
_SCALING_LOGITS = frozenset({"CohereForCausalLM", "Cohere2ForCausalLM"})


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
        return self._beside_unembedding(_parameter(self.model, "b_U"))

    @property
    def final_gain(self) -> Float[Tensor, " d_model"] | None:
        """The final norm's gain; ``None`` where it was folded into the unembedding.

        ``logit_scale`` is in it, so that logits come out scaled.
        """
        gain = _gain(self.model.ln_final, self.model.cfg, self.class_name)
        if gain is None and self.logit_scale != 1:
            gain = self.W_U.new_ones(self.d_model)
        return self._beside_unembedding(gain)

    @property
    def final_bias(self) -> Float[Tensor, " d_model"] | None:
        """The final norm's bias (LayerNorm only); ``None`` where absent or folded; likewise."""
        return self._beside_unembedding(_parameter(self.model.ln_final, "bias", "b"))

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
        return _parameter(self.model.blocks[layer].mlp, "b_out")

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Row [h, k] is the subvalue of attention neuron k of head h."""
        return self.model.blocks[layer].attn.W_O.detach()

    def b_O(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """The attention output's bias, which belongs to no neuron."""
        return _parameter(self.model.blocks[layer].attn, "b_O")

    def W_in(self, layer: int) -> Float[Tensor, "d_model d_mlp"]:
        """Column k is the subkey of FFN neuron k; in a gated FFN that of its up pre-activation."""
        return self._dense(layer).W_in.detach()

    def W_gate(self, layer: int) -> Float[Tensor, "d_model d_mlp"] | None:
        """Column k is the subkey of neuron k's gate pre-activation; ``None`` in a plain FFN."""
        return _parameter(self._dense(layer), "W_gate")

    def b_in(self, layer: int) -> Float[Tensor, " d_mlp"] | None:
        """What is added to ``W_in``'s product before the activation."""
        if self.class_name == "HookedTransformer" and self.W_gate(layer) is not None:
            return None  # there it is added after the product of gate and up
        return _parameter(self.model.blocks[layer].mlp, "b_in")

    def b_gate(self, layer: int) -> Float[Tensor, " d_mlp"] | None:
        """What is added to ``W_gate``'s product before the activation."""
        return _parameter(self.model.blocks[layer].mlp, "b_gate")

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
        W_V = _parameter(self.model.blocks[layer].attn, "_W_V", "W_V")
        assert W_V is not None
        return W_V

    def b_V(self, layer: int) -> Float[Tensor, "key_value_head d_head"] | None:
        """What is added to the value vectors."""
        return _parameter(self.model.blocks[layer].attn, "_b_V", "b_V")

    def attn_norm(self, layer: int) -> Norm:
        """The norm that attention reads the residual stream through."""
        return self._norm(layer, "ln1")

    def ffn_norm(self, layer: int) -> Norm:
        """The norm that the FFN reads the residual stream through (GPT-J's is attention's)."""
        return self._norm(layer, "ln2", "ln1")

    def _norm(self, layer: int, *names: str) -> Norm:
        if self.architecture in _POST_NORM_ONLY:
            return Norm(kind="none", gain=None, bias=None)
        parts = dict(self.model.blocks[layer].named_children())
        norm = next((parts[name] for name in names if name in parts), None)
        if norm is None:
            raise UnsupportedModelError(
                f"{self.architecture}: layer {layer} has no {' or '.join(names)}, so it is not "
                "known what its neurons read"
            )
        gain = _gain(norm, self.model.cfg, self.class_name)
        return Norm(kind=self.norm, gain=gain, bias=_parameter(norm, "bias", "b"))

    def post_norm(self, layer: int, kind: Kind) -> Norm | None:
        """The norm on what a sub-layer writes, before the residual stream; ``None`` without one."""
        name = _post_norm_name(self.model, self.architecture, layer, kind)
        if name is None:
            return None
        norm = getattr(self.model.blocks[layer], name)
        gain = _gain(norm, self.model.cfg, self.class_name)
        return Norm(kind=self.norm, gain=gain, bias=_parameter(norm, "bias", "b"))

    def token_text(self, token: int) -> str:
        """How one token reads in a sentence, with its leading space; ``<id>`` without tokenizer."""
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return f"<{token}>"
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
    class_name = _class_name(model)
    cfg = model.cfg
    parts = tuple(model.modules())
    # HookedTransformer has no dropout: its training flag, set by default, changes nothing
    if class_name != "HookedTransformer" and any(part.training for part in parts):
        raise InputError("the model is in training mode, where dropout acts; call model.eval()")
    if any(weight is not None and weight.is_meta for part in parts for weight in _own(part)):
        raise _offloaded(model)
    _refuse_unsupported(model)
    if class_name == "HookedTransformer":
        _refuse_misplaced(model)
    block = model.blocks[0]
    mixture = mixture_of(block.mlp, _architecture(cfg)) if _n_experts(cfg) else None
    W_out = block.mlp.W_out if mixture is None else mixture.down
    W_O = block.attn.W_O
    folded_norm, folded_values = _folding(model, class_name)
    processing = [
        name
        for name, done in (
            ("norms folded", folded_norm),
            ("value biases folded", folded_values),
            ("writing weights centred", _centred(W_out)),
            ("unembedding centred", _centred(model.W_U)),
        )
        if done
    ]
    n_heads = int(W_O.shape[0])
    return Host(
        model=model,
        class_name=class_name,
        model_name=_model_name(cfg),
        architecture=_architecture(cfg),
        processing=", ".join(processing) or "raw",
        value_biases_folded=folded_values,
        norm="rms_norm" if cfg.normalization_type.startswith("RMS") else "layer_norm",
        eps=float(cfg.eps),
        parallel=bool(cfg.parallel_attn_mlp),
        residual_scale=float(getattr(cfg, "residual_multiplier", None) or 1.0),
        logit_scale=_logit_scale(model),
        soft_cap=_soft_cap(cfg),
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


# --- hooks ------------------------------------------------------------------------------------


ROUTER_HOOKS = {"ffn_read": "hook_in", "routing": "hook_out"}
"""What a mixture of experts reads, and its router's logits, which the coefficients are made of.

Both have the positions of all rows in one axis."""


def hook_names(host: Host, layer: int) -> dict[str, str]:
    """The activations a capture reads in one layer, by the name it keeps them under."""
    block = f"blocks.{layer}."
    names = {
        "resid_pre": f"{block}hook_resid_pre",
        "resid_mid": f"{block}hook_resid_mid",
        "attn_out": f"{block}hook_attn_out",
        "mlp_out": f"{block}hook_mlp_out",
        "mlp_post": f"{block}mlp.hook_post",
        "pattern": f"{block}attn.hook_pattern",
        "v": f"{block}attn.hook_v",
        "z": f"{block}attn.hook_z",
    }
    if host.parallel:
        del names["resid_mid"]
    if host.n_experts:  # no activation holds its coefficients: they are made of these two
        del names["mlp_post"]
        names |= {name: f"{block}mlp.gate.{hook}" for name, hook in ROUTER_HOOKS.items()}
    for kind in get_args(Kind):
        post = _post_norm_name(host.model, host.architecture, layer, kind)
        if post is not None:
            names[f"{kind}_post_scale"] = f"{block}{post}.hook_scale"
    return names


def pre_activation_names(host: Host, layer: int) -> dict[str, str]:
    """Hooks of what a layer's FFN neurons are computed from: ``pre``, or ``gate`` and ``up``."""
    mlp = f"blocks.{layer}.mlp."
    if not host.gated:
        return {"pre": f"{mlp}hook_pre"}
    return {"gate": f"{mlp}hook_pre", "up": f"{mlp}hook_pre_linear"}


def coefficient_name(host: Host, layer: int, kind: Literal["ffn", "attn"]) -> str:
    """The hook of the neurons' coefficients in one layer: what ``W_out`` or ``W_O`` multiplies.

    Raises:
        UnsupportedModelError: For a mixture of experts, which has no such activation.
    """
    names = hook_names(host, layer)
    if kind == "ffn" and host.n_experts:
        raise UnsupportedModelError(
            f"{host.architecture}: no activation holds the coefficients of experts' neurons; "
            "coefficient_hooks makes them of what there is"
        )
    return names["mlp_post" if kind == "ffn" else "z"]


def final_resid_name(host: Host) -> str:
    """The hook of the residual stream after the last block."""
    return f"blocks.{host.n_layers - 1}.hook_resid_post"


def last_ffn_input_name(host: Host) -> str | None:
    """The hook of what the last FFN reads, if what it writes may be of fewer positions.

    One position's then meets the others by broadcasting; only where it belongs is the sum right.
    """
    if host.architecture.startswith("OPT"):
        return None  # some versions of it flatten positions, and restore their number
    name = "ln2.hook_normalized" if host.class_name == "HookedTransformer" else "mlp.hook_in"
    return f"blocks.{host.n_layers - 1}.{name}"


def unembedding_input_name(host: Host) -> str:
    """The hook of what is unembedded; what it lets through is all that logits are computed of."""
    return "unembed.hook_in"


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


def pattern_is_late(host: Host) -> bool:
    """Whether the hook of the attention pattern comes when attention has written already."""
    return host.class_name != "HookedTransformer" and host.architecture in _LATE_PATTERN


@contextmanager
def hooks_in_force(host: Host, hooks: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """Forward hooks that are in every call inside, whatever hooks others add or reset."""
    added: list[tuple[Any, Any]] = []
    try:
        for name, hook in hooks:
            point = host.model.hook_dict[name]
            # not model.hooks(...), which takes hooks away by how deep contexts are nested
            point.add_hook(hook, is_permanent=True)
            added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


@contextmanager
def attn_outputs_edited(
    host: Host, edits: Mapping[int, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """What the attention of some layers writes is edited when all of its own hooks are over."""
    handles = []

    def edited(output: Any, edit: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    try:
        for layer, edit in edits.items():
            attn = host.model.blocks[layer].attn
            handles.append(
                attn.register_forward_hook(
                    lambda _module, _inputs, output, edit=edit: edited(output, edit)
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def block_outputs(host: Host) -> Iterator[list[Any]]:
    """What the blocks return in a run inside, in whatever form they do: one entry a block."""
    outputs: list[Any] = []

    def keep(block: Any, went_in: Any, output: Any) -> None:
        outputs.append(output)

    handles = [block.register_forward_hook(keep) for block in host.model.blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def residual_of(output: Any) -> Float[Tensor, "row pos d_model"]:
    """The residual stream in what a block returned."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def starting_at(host: Host, layer: int, outputs: Sequence[Any], n_rows: int) -> Iterator[None]:
    """Runs inside start at ``layer``, all rows from the residual stream that entered it before.

    ``outputs`` are those of ``block_outputs`` in a run of one row. Blocks before ``layer`` are not
    run, so their hooks see nothing; everything else (masks, positions) the model makes as always.
    """
    if layer == 0:
        yield
        return
    before = outputs[layer - 1]
    rows = residual_of(before).repeat(n_rows, 1, 1)
    returned = (rows, *before[1:]) if isinstance(before, tuple) else rows
    skipped = [vars(block) for block in host.model.blocks[:layer]]
    own = [attributes.get("forward") for attributes in skipped]
    try:
        for attributes in skipped:
            attributes["forward"] = lambda *_, **__: returned
        yield
    finally:
        for attributes, forward in zip(skipped, own, strict=True):
            attributes.pop("forward", None)
            if forward is not None:  # others may have put one there
                attributes["forward"] = forward


def cache_is_of(
    host: Host, cache: Any, tokens: tuple[int, ...], *, row: int = 0, start: int = 0
) -> bool:
    """Whether row ``row`` of an ``ActivationCache`` was made from ``tokens``, as far as it tells.

    They are looked for from position ``start``; what is before and after them does not matter.
    """
    available = set(cache.keys())
    ids = torch.tensor(tokens)
    here = slice(start, start + len(tokens))
    if "embed.hook_in" in available:  # the bridge caches what goes into the embedding
        went_in = cache["embed.hook_in"]
        went_in = went_in[None] if went_in.ndim == 1 else went_in
        return torch.equal(went_in[row, here].cpu(), ids)
    if "hook_embed" in available:
        embedded = cache["hook_embed"]
        embedded = embedded[None] if embedded.ndim == 2 else embedded
        with torch.no_grad():
            # not W_E: the embedding of Bloom ends in a norm
            wanted = host.model.embed(ids[None].to(host.input_device))[0]
        return torch.allclose(embedded[row, here], wanted.to(embedded.device))
    return True


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


# --- tokens -----------------------------------------------------------------------------------


def tokenize(host: Host, prompt: Prompt) -> TokenizedPrompt:
    """``prompt`` as the model will see it; everything that can be wrong with it is found here.

    Raises:
        InputError: No tokenizer for a text; ids outside the vocabulary; longer than the context;
            position out of range; a target that is not one token (its tokens are shown).
    """
    if prompt.tokens is not None:
        tokens = prompt.tokens
    else:
        _need_tokenizer(host, "prompt")
        ids: Int[Tensor, "1 pos"] = host.model.to_tokens(
            prompt.text, prepend_bos=prompt.prepend_bos, truncate=False
        )
        tokens = tuple(ids[0].tolist())
    for position, token in enumerate(tokens):
        if not 0 <= token < host.d_vocab:
            bos_hint = (
                "; it is the BOS token the tokenizer adds: leave it out with prepend_bos=False "
                "(on the command line --no-bos)"
                if prompt.tokens is None and position == 0
                else ""
            )
            raise InputError(
                f"token id {token} at position {position} is outside the model's vocabulary "
                f"of {host.d_vocab}{bos_hint}"
            )
    if not tokens:
        raise InputError("the prompt has no tokens; give some text, or keep the BOS token")
    if len(tokens) > host.n_ctx:
        raise InputError(
            f"the prompt is {len(tokens)} tokens, longer than the model's context of "
            f"{host.n_ctx}; shorten it"
        )
    if not -len(tokens) <= prompt.position < len(tokens):
        raise InputError(
            f"position {prompt.position} is out of range: the prompt is {len(tokens)} tokens "
            f"(0 to {len(tokens) - 1}, or -{len(tokens)} to -1 from the end)"
        )
    return TokenizedPrompt(
        prompt_id=prompt.prompt_id or "0",
        text=prompt.text,
        tokens=tokens,
        token_texts=tuple(host.token_text(token) for token in tokens),
        read_pos=prompt.position % len(tokens),
        target=(
            None if prompt.target is None else resolve_target(host, prompt.target, prompt.against)
        ),
    )


def resolve_target(
    host: Host,
    target: str | SupportsIndex | None,
    against: str | SupportsIndex | None = None,
) -> Target:
    """The one token a target names, or the two tokens of a contrast.

    Raises:
        InputError: For an id outside the vocabulary, a text that is not exactly one token, or a
            contrast of a token with itself or with nothing.
    """
    if target is None:
        raise InputError("a contrast needs both tokens: give target beside against")
    token = one_token(host, target)
    if against is None:
        return token
    other = one_token(host, against)
    if other.id == token.id:
        raise InputError(f"target and against are the same token, {token.text!r}")
    return replace(token, against=other)


def one_token(host: Host, given: str | SupportsIndex, what: str = "target") -> Target:
    """The one token that ``given`` names, called ``what`` in errors.

    Raises:
        InputError: For an id outside the vocabulary, or a text that is not exactly one token.
    """
    if not isinstance(given, str):
        token = integer(given, "a token id")
        if not 0 <= token < host.d_vocab:
            raise InputError(
                f"{what} id {token} is outside the model's vocabulary of {host.d_vocab}"
            )
        return Target(id=token, text=host.token_text(token))
    _need_tokenizer(host, what)
    if not given:
        raise InputError(f"the {what} is empty; give a single-token {what} or a token id")
    ids = _encode(host, given)
    if len(ids) == 1:
        return one_token(host, ids[0], what)
    # SentencePiece adds a leading space of its own, so " Paris" encodes as two; what is meant
    # is the one token that reads " Paris"
    bare = _encode(host, given.strip(" ")) if given.startswith(" ") else []
    if len(bare) == 1 and host.token_text(bare[0]) == given:
        return Target(id=bare[0], text=given)
    pieces = ", ".join(repr(host.token_text(token)) for token in ids)
    spaced = [] if given.startswith(" ") else _encode(host, " " + given)
    hint = f" (did you mean {' ' + given!r}?)" if len(spaced) == 1 else ""
    raise InputError(
        f"{what} {given!r} is {len(ids)} tokens ({pieces}){hint}; "
        f"give a single-token {what} or a token id"
    )


def _encode(host: Host, text: str) -> list[int]:
    return list(host.model.tokenizer(text, add_special_tokens=False)["input_ids"])


def _need_tokenizer(host: Host, what: str) -> None:
    if getattr(host.model, "tokenizer", None) is None:
        raise InputError(
            f"the model has no tokenizer to read the {what} with; give token ids, or load the "
            "model from a directory that holds its tokenizer's files too"
        )


# --- what kind of model -----------------------------------------------------------------------


def _class_name(model: Any) -> str:
    names = [base.__name__ for base in type(model).__mro__]
    for name in ("TransformerBridge", "HookedTransformer"):
        if name in names:
            return name
    if isinstance(model, (str, os.PathLike)):
        raise InputError(f"expected a model, got its name; load it first: load_model({model!r})")
    raise InputError(
        "expected a TransformerBridge or a HookedTransformer, got a "
        f"{type(model).__name__}; save a Hugging Face model and its tokenizer to a directory and "
        "load_model(directory), or TransformerBridge.boot_transformers(..., hf_model=, tokenizer=)"
    )


def _architecture(cfg: Any) -> str:
    for field in ("original_architecture", "architecture"):
        value = getattr(cfg, field, None)
        if value:
            return str(value)
    return "unknown"


def _parameter(module: Any, *names: str) -> Tensor | None:
    """The first of ``names`` that ``module`` has as a tensor (a bridge may raise, or give None)."""
    for name in names:
        try:
            value = getattr(module, name, None)
        except (AttributeError, NotImplementedError, ValueError):
            value = None
        if isinstance(value, Tensor):
            return value.detach()
    return None


def _model_name(cfg: Any) -> str:
    name = str(getattr(cfg, "model_name", "unknown"))
    return "tiny-facts" if name == str(tiny_facts_dir()) else name


def _gain(norm: Any, cfg: Any, class_name: str) -> Tensor | None:
    gain = _parameter(norm, "weight", "w")
    # Gemma's checkpoints hold gain - 1; HookedTransformer adds the 1 when it loads them
    offset = class_name != "HookedTransformer" and getattr(cfg, "rmsnorm_uses_offset", False)
    return 1 + gain if gain is not None and offset else gain


def _logit_scale(model: Any) -> float:
    """What logits are multiplied by, as the model does it now."""
    if _architecture(model.cfg) in _SCALING_LOGITS:
        # not cfg.logit_scale, which stays where TransformerLens folds the number into weights
        return float(model.original_model.logit_scale)
    return 1.0 / float(getattr(model.cfg, "logits_scaling", None) or 1.0)


def _soft_cap(cfg: Any) -> float | None:
    cap = getattr(cfg, "output_logits_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None


def _post_norm_name(model: Any, architecture: str, layer: int, kind: Kind) -> str | None:
    """What the block calls the norm on its attention's, or its FFN's, output; if it has one."""
    parts = dict(model.blocks[layer].named_children())
    name = "ln1" if kind == "attn" else "ln2"
    if f"{name}_post" in parts:
        return f"{name}_post"
    return name if architecture in _POST_NORM_ONLY and name in parts else None


def _centred(weight: Matrix) -> bool:
    """Whether the mean was taken out of a weight's rows (which changes no score); a few tell."""
    _, block = next(blocks_of(weight, 64))
    rows = block.detach()
    rows = rows[rows.any(-1)][:8]  # a row that was zeroed tells nothing
    if not len(rows):
        return False
    rounding = 1e-3 * torch.finfo(weight.dtype).eps ** 0.5
    largest = torch.maximum(rows.amax(), -rows.amin())  # not abs(), which copies
    return bool(rows.mean(-1).abs().amax() < rounding * largest)


def _folding(model: Any, class_name: str) -> tuple[bool, bool]:
    """Whether norms, and whether value biases, were folded into their neighbours."""
    cfg = model.cfg
    if class_name == "HookedTransformer":
        norms = cfg.normalization_type.endswith("Pre")
        processed = True  # each kind of folding can be chosen on its own when loading
    else:
        processed = bool(getattr(model, "compatibility_mode", False))
        gain = _gain(model.ln_final, cfg, class_name)
        bias = _parameter(model.ln_final, "bias", "b")
        norms = (
            processed
            and gain is not None
            and bool((gain == 1).all())
            and (bias is None or bool((bias == 0).all()))
        )
    if not processed or (_architecture(cfg) in _WITHOUT_VALUE_BIAS and not norms):
        return norms, False
    attns = [block.attn for block in model.blocks]
    value_biases = [_parameter(attn, "b_V") for attn in attns]
    output_biases = [_parameter(attn, "b_O") for attn in attns]
    values = all(bias is not None and not bias.any() for bias in value_biases) and any(
        bias is not None and bool(bias.any()) for bias in output_biases
    )
    return norms, values


def _own(part: torch.nn.Module) -> Iterable[torch.nn.Parameter | None]:
    # not .parameters(recurse=False), which takes as long for a module without any
    return part._parameters.values()


def _offloaded(model: Any) -> InputError:
    """Why a model is refused whose weights are in memory during its forward pass alone."""
    absent = [name for name, weight in model.named_parameters() if weight.is_meta]
    return InputError(
        f"{len(absent)} of the model's weights are not in memory, e.g. {absent[0]!r}: they are "
        "offloaded to the CPU or to disk, or were never loaded, and scores are read off the "
        "weights; load it over enough GPUs (load_model(name, device='auto')), all of it on the "
        "CPU (device='cpu'), or in bfloat16"
    )


def _refuse_misplaced(model: Any) -> None:
    """Stop where a HookedTransformer's parts are not where its forward pass looks for them.

    It brings the residual stream to a device that it derives from a layer's number. But with
    ``n_devices`` TransformerLens 3.9 places each part on the GPU that has most memory left.
    """
    cfg, n_layers = model.cfg, len(model.blocks)
    parts = {"embed": (0, model.embed), "pos_embed": (0, getattr(model, "pos_embed", None))}
    parts |= {f"blocks[{layer}]": (layer, block) for layer, block in enumerate(model.blocks)}
    parts |= {name: (n_layers - 1, getattr(model, name)) for name in ("ln_final", "unembed")}
    found = {
        name: (layer, next(part.parameters()).device)
        for name, (layer, part) in parts.items()
        if part is not None and any(True for _ in part.parameters())  # a folded norm has none
    }
    if len({device for _, device in found.values()}) == 1:
        return
    first, n_devices = torch.device(cfg.device), int(getattr(cfg, "n_devices", None) or 1)
    for name, (layer, device) in found.items():
        index = (first.index or 0) + layer * n_devices // n_layers
        expected = first if first.type == "cpu" else torch.device(first.type, index)
        if device != expected:
            raise InputError(
                f"model.{name} is on {device}, but the forward pass of a HookedTransformer with "
                f"n_devices={n_devices} takes it to be on {expected}; move it: "
                f"model.{name}.to({str(expected)!r})"
            )


def _n_experts(cfg: Any) -> int:
    names = ("num_experts", "num_local_experts")
    return max(int(getattr(cfg, name, None) or 0) for name in names)


def _scorable(weight: Matrix) -> bool:
    return weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make_exact(model: Any) -> None:
    """Have a model's experts computed one by one, for other ways to do it know no float64."""
    if _n_experts(model.cfg) and hasattr(model, "original_model"):
        model.original_model.set_experts_implementation("eager")


def has_hooks(model: Any) -> bool:
    """Whether the caller has hooks on the model now, which may edit what passes through."""
    return any(point.fwd_hooks for point in model.hook_dict.values())


def _refuse_unsupported(model: Any) -> None:
    """Stop at every architecture whose neurons would come out wrong, saying why."""
    cfg = model.cfg
    architecture = _architecture(cfg)

    def setting(name: str) -> Any:
        return getattr(cfg, name, None)

    def refuse(reason: str) -> None:
        raise UnsupportedModelError(f"{architecture} is not supported: {reason}")

    for part in ("blocks", "ln_final", "unembed"):
        if not hasattr(model, part):
            refuse(f"it has no {part!r}; only decoders with a final norm can be read out")
    if setting("is_encoder_decoder"):
        refuse("it is an encoder-decoder")
    mixed = _n_experts(cfg) > 0
    if mixed and architecture not in KNOWN:
        refuse(
            "its FFN is a mixture of experts whose router is not known; those of "
            f"{', '.join(KNOWN)} are"
        )
    if mixed and _class_name(model) == "HookedTransformer":
        refuse(
            "its FFN is a mixture of experts, which is known on the bridge alone; load it as a "
            "TransformerBridge"
        )
    if setting("is_stateful"):
        refuse("it is a state-space or recurrent model, not an attention decoder")
    if setting("attention_dir") == "bidirectional":
        refuse("it is an encoder; only causal decoders predict a next token")
    if setting("load_in_4bit") or setting("load_in_8bit") or not _scorable(model.W_U):
        refuse("its weights are quantised; load it in float32, bfloat16 or float16")
    if (setting("logit_scale") or 1) != 1 and architecture not in _SCALING_LOGITS:
        refuse("its logits are scaled, by a number that TransformerLens folds into weights or not")
    if architecture in _SCALING_LOGITS and not setting("rotary_interleaved_cos_sin"):
        refuse(
            "this TransformerLens rotates its queries and keys otherwise than Hugging Face does, "
            "so it predicts something else; TransformerLens 4.3 does it right"
        )
    if setting("do_layer_norm_before") is False:
        refuse("it normalises the residual stream after each sub-layer (post-LayerNorm)")
    if setting("normalization_type") not in ("LN", "LNPre", "RMS", "RMSPre"):
        refuse(f"its norm is {setting('normalization_type')!r}, neither LayerNorm nor RMSNorm")
    if setting("attn_only"):
        refuse("it has no FFN")
    shapes: dict[str, torch.Size] = {}
    for layer, block in enumerate(model.blocks):
        parts = dict(block.named_children())
        for part in ("attn", "mlp"):
            if part not in parts:
                refuse(f"layer {layer} has no {part!r}")
        posts = [_post_norm_name(model, architecture, layer, kind) for kind in get_args(Kind)]
        if any(posts) and not str(setting("normalization_type")).startswith("RMS"):
            refuse("a LayerNorm is on the output of each sub-layer; only RMSNorms are known there")
        if posts != [_post_norm_name(model, architecture, 0, kind) for kind in get_args(Kind)]:
            refuse("some of its layers norm what they write, and others do not")
        if mixed and not has_experts(block.mlp):
            refuse(
                "some of its layers have a mixture of experts, and others do not: only layers of "
                "equally many FFN neurons are known"
            )
        weights: dict[str, Matrix | None] = {
            "W_out": mixture_of(block.mlp, architecture).down
            if mixed
            else _parameter(block.mlp, "W_out"),
            "W_O": _parameter(block.attn, "W_O"),
        }
        for name, weight in weights.items():
            if weight is None:
                refuse(f"layer {layer} has no {name}: its neurons are not the rows of one matrix")
            elif not _scorable(weight):
                refuse("its weights are quantised; load it in float32, bfloat16 or float16")
            elif shapes.setdefault(name, weight.shape) != weight.shape:
                refuse(f"layer {layer} has a {name} of another shape than layer 0")
