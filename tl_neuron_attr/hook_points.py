"""Hooks: what each of them is called in either class, and what is in force for a while."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.architecture import post_norm_name
from tl_neuron_attr.errors import UnsupportedModelError
from tl_neuron_attr.host import Host
from tl_neuron_attr.neurons import Kind
from tl_neuron_attr.state import foreign

# Families whose bridge calls the hook of the attention pattern after those of z and the output.
_LATE_PATTERN = frozenset({"GPTJForCausalLM", "GPTNeoForCausalLM", "OPTForCausalLM"})

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
        post = post_norm_name(host.model, host.architecture, layer, kind)
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


def unembedding_output_name(host: Host) -> str:
    """The hook of what the unembedding gives: logits, before they are scaled or capped."""
    return "unembed.hook_out"


def pattern_is_late(host: Host) -> bool:
    """Whether the hook of the attention pattern comes when attention has written already."""
    return host.class_name != "HookedTransformer" and host.architecture in _LATE_PATTERN


def has_hooks(model: Any) -> bool:
    """Whether the caller has hooks on the model now, which may edit what passes through.

    TransformerLens's and torch's own; not those by which the model itself works.
    """
    points = (hook.user_hook for point in model.hook_dict.values() for hook in point.fwd_hooks)
    modules = (
        hook
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    )
    return any(foreign(hook) for hook in (*points, *modules))


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
