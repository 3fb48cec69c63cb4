"""Many runs, each without other parts: rows of one forward pass, each with its own parts zeroed.

A part is zeroed as ``values`` says, at all positions; but an attention neuron of one source
position is taken out of ``z`` at the read position of its row's prompt, and nothing else changes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from tl_neuron_attr.capture import capture_rows, check_same_run
from tl_neuron_attr.captured import Capture
from tl_neuron_attr.forward import (
    Hook,
    capture_blocks,
    coefficient_hooks,
    final_residuals,
    tokens_at_a_time,
)
from tl_neuron_attr.hook_points import hook_names, residual_of
from tl_neuron_attr.host import Host, batch_regime
from tl_neuron_attr.interventions.values import (
    Zeroed,
    check_zeroed,
    sources_by_layer,
    units_by_layer,
)
from tl_neuron_attr.neurons import Head
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import Target, TokenizedPrompt
from tl_neuron_attr.readout import read_out


def capture_zeroed(
    host: Host, prompts: Sequence[TokenizedPrompt], zeroed: Sequence[Zeroed]
) -> list[Capture]:
    """What happens in ``prompts[i]`` without ``zeroed[i]``, for each i, in as few batches as fit.

    What is zeroed has coefficient 0 in its capture: of FFN neurons ``mlp_post``, of heads and
    attention neurons the entry of ``v``, which then is one for each head, so that neurons still
    add up to what their block wrote.

    Raises:
        InputError: If the model has no such head or neuron.
        NonFiniteError: If an activation is NaN or infinite.

    Cost: one forward pass of that many rows (several, where they are more than 4,096 tokens; on
    the bridges of GPT-J, OPT and GPT-Neo one more for each layer with a source position).
    """
    masks = _masks(host, prompts, zeroed)
    found: dict[int, Capture] = {}
    for rows in batches(host, prompts):
        some = [prompts[row] for row in rows]
        here = [masks[row] for row in rows]
        captures = _run(host, some, here, partial(capture_rows, host, some))
        for row, captured, mask in zip(rows, captures, here, strict=True):
            found[row] = _without(host, captured, mask)
    return [found[row] for row in range(len(prompts))]


def zeroed_residuals(
    host: Host, prompts: Sequence[TokenizedPrompt], zeroed: Sequence[Zeroed]
) -> Float[Tensor, "row d_model"]:
    """The last residual of ``prompts[i]`` without ``zeroed[i]``, at its read position, for each i.

    ``read_out(host, ..., "recomputed")`` gives the log-probabilities the model has then. Errors
    and cost are those of ``capture_zeroed``, without memory for captures.
    """
    masks = _masks(host, prompts, zeroed)
    return masked_residuals(host, prompts, masks.__getitem__)


@full_precision()
def head_scan(host: Host, captured: Capture, target: Target) -> Float[Tensor, "layer head"]:
    """Change of log p(target), in nats, when each head alone is zeroed at all positions.

    Negative where the head helped. For a contrast the change of log p(target) - log p(against).
    It is the model's own prediction, its final norm taken anew in every run, whatever convention
    the prompt was attributed by. Of an ``Attribution``: ``head_scan(result.host, result.captured,
    result.target)``.

    Cost: one forward pass, then one of ``n_heads`` rows from each layer on, without unembedding.
    At GPT-2-small shape and 16 tokens that took 15 forward passes' time for 144
    heads, on 2 cores (``tests/benchmarks/bench_engine.py``).
    Peak memory: the residual stream of every layer and position, and one such pass.

    Raises:
        InputError: If a new run of the prompt does not give what was captured.
        NonFiniteError: If an activation is NaN or infinite.
    """
    prompt = captured.prompt
    at_a_time = max(1, tokens_at_a_time(host, "attn") // len(prompt.tokens))
    with torch.no_grad():
        outputs = capture_blocks(host, prompt)
        final = residual_of(outputs[-1])[0, prompt.read_pos]
        final = final.to(host.device, torch.promote_types(final.dtype, torch.float32))
        check_same_run(host, captured, final)
        rows = [final[None]]
        for layer in range(host.n_layers):
            alone = [Zeroed((Head(layer, head),)) for head in range(host.n_heads)]
            for first in range(0, host.n_heads, at_a_time):
                heads = alone[first : first + at_a_time]
                masks = [_mask(host, prompt, head) for head in heads]
                prompts = [prompt] * len(heads)
                start = (layer, outputs)
                run = partial(final_residuals, host, prompts, start=start)
                rows.append(_run(host, prompts, masks, run))
        # with its norm recomputed, the read-out is what the model itself does
        log_probs = read_out(host, final, "recomputed").log_prob(torch.cat(rows), target)
    return (log_probs[1:] - log_probs[0]).reshape(host.n_layers, host.n_heads)


# --- masks: what is zeroed, as tensors --------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ZeroMask:
    """What is zeroed in one run, by layer; layers without anything are left out."""

    ffn: dict[int, Bool[Tensor, " d_mlp"]]
    attn: dict[int, Bool[Tensor, "head d_head"]]
    """At all positions."""
    sources: dict[int, Bool[Tensor, "head pos d_head"]]
    """Of the read position alone, by source position up to it."""


def _masks(
    host: Host, prompts: Sequence[TokenizedPrompt], zeroed: Sequence[Zeroed]
) -> list[ZeroMask]:
    for prompt, parts in zip(prompts, zeroed, strict=True):
        check_zeroed(host, parts, prompt)
    return [_mask(host, prompt, parts) for prompt, parts in zip(prompts, zeroed, strict=True)]


def _mask(host: Host, prompt: TokenizedPrompt, zeroed: Zeroed) -> ZeroMask:
    mask = ZeroMask(ffn={}, attn={}, sources={})
    for (kind, layer), units in units_by_layer(host, zeroed.parts).items():
        (mask.ffn if kind == "ffn" else mask.attn)[layer] = units
    n_pos = prompt.read_pos + 1
    for layer, where in sources_by_layer(zeroed.parts).items():
        mask.sources[layer] = _no(host.n_heads, n_pos, host.d_head)
        mask.sources[layer][where.unbind(1)] = True
    return mask


def _no(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


def masked_residuals(
    host: Host, prompts: Sequence[TokenizedPrompt], mask_of: Callable[[int], ZeroMask]
) -> Float[Tensor, "row d_model"]:
    """``zeroed_residuals`` of masks, each made by its row's number when its batch is run."""
    found: dict[int, Tensor] = {}
    for rows in batches(host, prompts):
        some = [prompts[row] for row in rows]
        here = [mask_of(row) for row in rows]
        resid = _run(host, some, here, partial(final_residuals, host, some))
        found |= dict(zip(rows, resid, strict=True))
    return torch.stack([found[row] for row in range(len(prompts))])


def batches(host: Host, prompts: Sequence[TokenizedPrompt]) -> Iterator[list[int]]:
    """Places of prompts that share a forward pass: of about the same length, and not too many."""
    regimes: dict[tuple[int, int], list[int]] = {}
    most = tokens_at_a_time(host, "ffn")
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row].tokens)):
        regimes.setdefault(batch_regime(host, len(prompts[row].tokens)), []).append(row)
    for rows in regimes.values():
        batch: list[int] = []
        for row in rows:
            # in order of length: the next is the longest of them
            if batch and (len(batch) + 1) * len(prompts[row].tokens) > most:
                yield batch
                batch = []
            batch.append(row)
        yield batch


def _without(host: Host, captured: Capture, mask: ZeroMask) -> Capture:
    """The capture with value vectors of 0 where they were zeroed; experts' neurons likewise."""
    if host.n_experts and mask.ffn:  # what an edit makes of theirs is no activation
        mlp_post = captured.mlp_post.clone()
        for layer, zeroed in mask.ffn.items():
            mlp_post[layer].masked_fill_(zeroed.to(mlp_post.device), 0.0)
        captured = replace(captured, mlp_post=mlp_post)
    if not mask.attn and not mask.sources:
        return captured
    v = captured.v.repeat_interleave(host.n_heads // captured.v.shape[2], dim=2)
    for layer, zeroed in mask.attn.items():
        v[layer].masked_fill_(zeroed.to(v.device), 0.0)
    for layer, zeroed in mask.sources.items():
        v[layer].masked_fill_(zeroed.transpose(0, 1).to(v.device), 0.0)
    return replace(captured, v=v)


# --- hooks ------------------------------------------------------------------------------------


Found = TypeVar("Found")


def _run(
    host: Host,
    prompts: Sequence[TokenizedPrompt],
    masks: Sequence[ZeroMask],
    run: Callable[[Sequence[Hook]], Found],
) -> Found:
    """What ``run`` finds under hooks by which its row i goes without what ``masks[i]`` names."""
    late: list[int] = []
    hooks = _zero_hooks(host, prompts, masks, late)
    found = run(hooks)
    for _ in tuple(late):  # each run settles one layer, and so what the next one attends to
        found = run(hooks)
    return found


def _zero_hooks(
    host: Host,
    prompts: Sequence[TokenizedPrompt],
    masks: Sequence[ZeroMask],
    late: list[int],
) -> list[Hook]:
    """The hooks; into ``late`` go layers whose pattern is seen only after it was used."""
    hooks: list[Hook] = []
    for layer in range(host.n_layers):
        names = hook_names(host, layer)
        ffn = _rows([mask.ffn.get(layer) for mask in masks])
        if ffn is not None:
            hooks += coefficient_hooks(host, layer, "ffn", partial(_zero, mask=ffn))
        if any(layer in mask.sources for mask in masks):
            # before the others: of what is zeroed altogether nothing is to be left
            sources = [mask.sources.get(layer) for mask in masks]
            hooks += _taking_hooks(names, prompts, sources, partial(late.append, layer))
        attn = _rows([mask.attn.get(layer) for mask in masks])
        if attn is not None:
            hooks.append((names["z"], partial(_zero, mask=attn)))
    return hooks


def _rows(masks: Sequence[Tensor | None]) -> Tensor | None:
    """One mask a row, or ``None`` if no row has any."""
    first = next((mask for mask in masks if mask is not None), None)
    if first is None:
        return None
    return torch.stack([torch.zeros_like(first) if mask is None else mask for mask in masks])


def _zero(activation: Tensor, hook: Any, *, mask: Bool[Tensor, "row ..."]) -> Tensor:
    return activation.masked_fill(mask[:, None].to(activation.device), 0.0)


def _taking_hooks(
    names: dict[str, str],
    prompts: Sequence[TokenizedPrompt],
    masks: Sequence[Bool[Tensor, "head _ d_head"] | None],
    is_late: Callable[[], object],
) -> list[Hook]:
    """Hooks of one layer that take out of ``z`` what some neurons carry to the read position.

    On some bridges (GPT-J, OPT, GPT-Neo) the pattern is only known once attention is over. Then
    nothing is taken in a first run, and the next takes by the pattern of the one before.
    """
    rows = torch.arange(len(prompts))
    reads = torch.tensor([prompt.read_pos for prompt in prompts])
    n_heads, _, d_head = next(mask.shape for mask in masks if mask is not None)
    n_pos = int(reads.max()) + 1
    taken = _no(len(prompts), n_heads, n_pos, d_head)
    for row, mask in enumerate(masks):
        if mask is not None:
            taken[row, :, : mask.shape[1]] = mask
    seen: dict[str, Tensor] = {}

    def keep_pattern(activation: Tensor, hook: Any) -> None:
        seen["pattern"] = activation[rows, :, reads, :n_pos]

    def keep_v(activation: Tensor, hook: Any) -> None:
        seen["v"] = activation[:, :n_pos].repeat_interleave(n_heads // activation.shape[2], dim=2)

    def take(activation: Tensor, hook: Any) -> Tensor:
        if "pattern" not in seen:
            is_late()
            return activation
        carried = einsum(
            seen["pattern"].to(activation),  # HookedTransformer has it where the first layer is
            seen["v"],
            taken.to(activation),
            "row head pos, row pos head d_head, row head pos d_head -> row head d_head",
        )
        edited = activation.clone()
        edited[rows, reads] -= carried
        return edited

    return [(names["pattern"], keep_pattern), (names["v"], keep_v), (names["z"], take)]
