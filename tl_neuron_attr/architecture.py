"""What kind of model it is, read off a model as it was given; and which kinds are refused."""

import os
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor

from tl_neuron_attr.errors import InputError, UnsupportedModelError
from tl_neuron_attr.experts import KNOWN, has_experts, mixture_of
from tl_neuron_attr.neurons import Kind
from tl_neuron_attr.pieces import Matrix, blocks_of
from tl_neuron_attr.tiny_facts import tiny_facts_dir

# Families without a value bias whose attention output has one: zeros there mean that nothing was
# folded, unless the norms were, which makes value biases. (HookedTransformer shows an absent bias
# as zeros, so names are all there is.)
_WITHOUT_VALUE_BIAS = frozenset({"GPTNeoForCausalLM"})

# Families that norm what each sub-layer writes and nothing it reads. TransformerLens 3.9 calls
# these norms ln1 and ln2, as it calls those in front of a sub-layer elsewhere.
POST_NORM_ONLY = frozenset({"Olmo2ForCausalLM", "Olmo3ForCausalLM"})

# Families whose Hugging Face module holds the number that it multiplies its logits by.
_SCALING_LOGITS = frozenset({"CohereForCausalLM", "Cohere2ForCausalLM"})


def check_supported(model: Any) -> str:
    """The name of the model's class, once its neurons are known to come out right.

    Raises:
        InputError: If ``model`` is not a TransformerLens model; drops activations at random
            because it is in training mode; has weights that are not in memory; or is spread over
            devices otherwise than its forward pass takes it to be.
        UnsupportedModelError: If its architecture is not supported, naming the reason.
    """
    class_name = class_of(model)
    parts = tuple(model.modules())
    # HookedTransformer has no dropout: its training flag, set by default, changes nothing
    if class_name != "HookedTransformer" and any(part.training for part in parts):
        raise InputError("the model is in training mode, where dropout acts; call model.eval()")
    if any(weight is not None and weight.is_meta for part in parts for weight in _own(part)):
        raise _offloaded(model)
    _refuse_unsupported(model)
    if class_name == "HookedTransformer":
        _refuse_misplaced(model)
    return class_name


def class_of(model: Any) -> str:
    """``TransformerBridge`` or ``HookedTransformer``; an error for anything else."""
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


def architecture_of(cfg: Any) -> str:
    """What Hugging Face calls the architecture; ``unknown`` where nothing says."""
    for field in ("original_architecture", "architecture"):
        value = getattr(cfg, field, None)
        if value:
            return str(value)
    return "unknown"


def tensor_of(module: Any, *names: str) -> Tensor | None:
    """The first of ``names`` that ``module`` has as a tensor (a bridge may raise, or give None)."""
    for name in names:
        try:
            value = getattr(module, name, None)
        except (AttributeError, NotImplementedError, ValueError):
            value = None
        if isinstance(value, Tensor):
            return value.detach()
    return None


def model_name_of(cfg: Any) -> str:
    """The name the model was loaded by."""
    name = str(getattr(cfg, "model_name", "unknown"))
    return "tiny-facts" if name == str(tiny_facts_dir()) else name


def gain_of(norm: Any, cfg: Any, class_name: str) -> Tensor | None:
    """What a norm multiplies by; ``None`` where it was folded, or there is none."""
    gain = tensor_of(norm, "weight", "w")
    # Gemma's checkpoints hold gain - 1; HookedTransformer adds the 1 when it loads them
    offset = class_name != "HookedTransformer" and getattr(cfg, "rmsnorm_uses_offset", False)
    return 1 + gain if gain is not None and offset else gain


def logit_scale_of(model: Any) -> float:
    """What logits are multiplied by, as the model does it now."""
    if architecture_of(model.cfg) in _SCALING_LOGITS:
        # not cfg.logit_scale, which stays where TransformerLens folds the number into weights
        return float(model.original_model.logit_scale)
    return 1.0 / float(getattr(model.cfg, "logits_scaling", None) or 1.0)


def soft_cap_of(cfg: Any) -> float | None:
    """The number that logits cannot pass; ``None`` without one."""
    cap = getattr(cfg, "output_logits_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None


def post_norm_name(model: Any, architecture: str, layer: int, kind: Kind) -> str | None:
    """What the block calls the norm on its attention's, or its FFN's, output; if it has one."""
    parts = dict(model.blocks[layer].named_children())
    name = "ln1" if kind == "attn" else "ln2"
    if f"{name}_post" in parts:
        return f"{name}_post"
    return name if architecture in POST_NORM_ONLY and name in parts else None


def is_centred(weight: Matrix) -> bool:
    """Whether the mean was taken out of a weight's rows (which changes no score); a few tell."""
    _, block = next(blocks_of(weight, 64))
    rows = block.detach()
    rows = rows[rows.any(-1)][:8]  # a row that was zeroed tells nothing
    if not len(rows):
        return False
    rounding = 1e-3 * torch.finfo(weight.dtype).eps ** 0.5
    largest = torch.maximum(rows.amax(), -rows.amin())  # not abs(), which copies
    return bool(rows.mean(-1).abs().amax() < rounding * largest)


def folding_of(model: Any, class_name: str) -> tuple[bool, bool]:
    """Whether norms, and whether value biases, were folded into their neighbours."""
    cfg = model.cfg
    if class_name == "HookedTransformer":
        norms = cfg.normalization_type.endswith("Pre")
        processed = True  # each kind of folding can be chosen on its own when loading
    else:
        processed = bool(getattr(model, "compatibility_mode", False))
        gain = gain_of(model.ln_final, cfg, class_name)
        bias = tensor_of(model.ln_final, "bias", "b")
        norms = (
            processed
            and gain is not None
            and bool((gain == 1).all())
            and (bias is None or bool((bias == 0).all()))
        )
    if not processed or (architecture_of(cfg) in _WITHOUT_VALUE_BIAS and not norms):
        return norms, False
    attns = [block.attn for block in model.blocks]
    value_biases = [tensor_of(attn, "b_V") for attn in attns]
    output_biases = [tensor_of(attn, "b_O") for attn in attns]
    values = all(bias is not None and not bias.any() for bias in value_biases) and any(
        bias is not None and bool(bias.any()) for bias in output_biases
    )
    return norms, values


def n_experts_of(cfg: Any) -> int:
    """How many experts each layer has; 0 where it has one FFN."""
    names = ("num_experts", "num_local_experts")
    return max(int(getattr(cfg, name, None) or 0) for name in names)


def make_exact(model: Any) -> None:
    """Have a model's experts computed one by one, for other ways to do it know no float64."""
    if n_experts_of(model.cfg) and hasattr(model, "original_model"):
        model.original_model.set_experts_implementation("eager")


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


def _refuse_unsupported(model: Any) -> None:
    """Stop at every architecture whose neurons would come out wrong, saying why."""
    cfg = model.cfg
    architecture = architecture_of(cfg)

    def setting(name: str) -> Any:
        return getattr(cfg, name, None)

    def refuse(reason: str) -> None:
        raise UnsupportedModelError(f"{architecture} is not supported: {reason}")

    for part in ("blocks", "ln_final", "unembed"):
        if not hasattr(model, part):
            refuse(f"it has no {part!r}; only decoders with a final norm can be read out")
    if setting("is_encoder_decoder"):
        refuse("it is an encoder-decoder")
    mixed = n_experts_of(cfg) > 0
    config = getattr(getattr(model, "original_model", None), "config", None)
    of_attn = getattr(config, "attn_config", None)  # MPT keeps it there
    if any(getattr(each, "clip_qkv", None) is not None for each in (config, of_attn)):
        refuse(
            "it clips its value vectors (clip_qkv) behind the hook they are seen at, so that "
            "attention would be decomposed into other ones than it adds up"
        )
    shared = getattr(config, "shared_expert_intermediate_size", None)
    folded = getattr(model, "compatibility_mode", False) and shared == setting("d_model")
    if architecture == "Qwen2MoeForCausalLM" and folded:
        refuse(
            f"TransformerLens takes its shared expert, as wide as the residual stream ({shared}), "
            "for another part when it folds norms, and it predicts something else then; load it "
            "raw (without enable_compatibility_mode)"
        )
    if mixed and architecture not in KNOWN:
        refuse(
            "its FFN is a mixture of experts whose router is not known; those of "
            f"{', '.join(KNOWN)} are"
        )
    if mixed and class_of(model) == "HookedTransformer":
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
        posts = [post_norm_name(model, architecture, layer, kind) for kind in get_args(Kind)]
        if any(posts) and not str(setting("normalization_type")).startswith("RMS"):
            refuse("a LayerNorm is on the output of each sub-layer; only RMSNorms are known there")
        if posts != [post_norm_name(model, architecture, 0, kind) for kind in get_args(Kind)]:
            refuse("some of its layers norm what they write, and others do not")
        if mixed and not has_experts(block.mlp):
            refuse(
                "some of its layers have a mixture of experts, and others do not: only layers of "
                "equally many FFN neurons are known"
            )
        weights: dict[str, Matrix | None] = {
            "W_out": mixture_of(block.mlp, architecture).down
            if mixed
            else tensor_of(block.mlp, "W_out"),
            "W_O": tensor_of(block.attn, "W_O"),
        }
        for name, weight in weights.items():
            if weight is None:
                refuse(f"layer {layer} has no {name}: its neurons are not the rows of one matrix")
            elif not _scorable(weight):
                refuse("its weights are quantised; load it in float32, bfloat16 or float16")
            elif shapes.setdefault(name, weight.shape) != weight.shape:
                refuse(f"layer {layer} has a {name} of another shape than layer 0")


def _scorable(weight: Matrix) -> bool:
    return weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
