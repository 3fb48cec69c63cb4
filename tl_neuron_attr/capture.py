"""What happened: the forward pass of a prompt, or of several, kept as tensors and plain facts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.captured import (
    LAYERED,
    SOURCED,
    Capture,
    Sources,
    prompt_name,
    refuse_non_finite,
)
from tl_neuron_attr.errors import InputError, NonFiniteError
from tl_neuron_attr.experts import coefficients as expert_coefficients
from tl_neuron_attr.forward import (
    OF_EXPERTS,
    Hook,
    edited_coefficients,
    forward,
    scoring_copy,
    start_of,
)
from tl_neuron_attr.hook_points import (
    cache_is_of,
    final_resid_name,
    hook_names,
    pre_activation_names,
    unembedding_output_name,
)
from tl_neuron_attr.host import Host, batch_regime, final_logits
from tl_neuron_attr.pieces import blocks_of
from tl_neuron_attr.prompts import PaddingSide, TokenizedPrompt

# Largest difference to the value vectors captured before, relative to the largest, by the dtype of
# the model: a prompt alone and in a batch differ by rounding.
_SAME_RUN = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def capture(host: Host, prompt: TokenizedPrompt, cache: Any = None) -> Capture:
    """The forward pass of ``prompt``, run now, or read from ``cache``.

    A run leaves the model as it was: the hooks only copy what one position needs, are removed at
    the end, and the caller's own hooks stay in force. ``cache`` is what ``run_with_cache``
    returned for exactly these tokens (an ``ActivationCache``, with or without batch axis).

    Raises:
        InputError: If ``cache`` lacks an activation, or is of other tokens.
        NonFiniteError: If an activation is NaN or infinite, naming the first layer it occurs in.

    Cost: one forward pass; beyond it, memory for the fields of ``Capture``.
    """
    if cache is not None:
        _, length = _cache_size(host, cache)
        if length > len(prompt.tokens):
            raise _wrong_length(length, [prompt])
    return capture_all(host, [prompt], cache)[0]


def capture_all(
    host: Host,
    prompts: Sequence[TokenizedPrompt],
    cache: Any = None,
    *,
    padding_side: PaddingSide = "right",
) -> list[Capture]:
    """What ``capture`` gives for each of ``prompts``, to rounding, from one forward pass.

    Prompts may differ in length and read position; they are padded on ``padding_side``, and
    nothing at a padded position is kept or looked at. Prompts of the same tokens are run once,
    and their captures share tensors where they are read at the same position too (one prompt,
    many targets). As in ``capture`` the model is left as it was; the caller's own hooks see the
    padded batch.

    ``cache`` is what ``run_with_cache`` returned for a batch whose row i is prompt i, padded on
    ``padding_side`` with whatever tokens; on the left it takes an ``attention_mask``.

    Raises:
        InputError: If ``cache`` lacks an activation, has not one row per prompt, is shorter than
            the longest prompt, is of other tokens, or is padded on the other side; if a prompt
            attends to its padding; or for padding on the left in float64 on the bridge, where
            Hugging Face gives NaN.
        NonFiniteError: If an activation is NaN or infinite, naming the prompt and the first layer.

    Cost: one forward pass of ``len(prompts)`` rows as long as the longest prompt; beyond it,
    memory for the captures. (Prompts on both sides of a length where the model changes its rotary
    positions, as Phi-3's long-context versions do, take a pass each side; so do those whose
    lengths differ by more than a window of sliding attention.)
    """
    if padding_side not in get_args(PaddingSide):
        raise InputError(f"padding_side must be 'right' or 'left'; got {padding_side!r}")
    if cache is not None:
        captures = _read_cache(host, prompts, cache, padding_side)
        refuse_non_finite(captures)
        return captures
    distinct: dict[tuple[int, int], dict[Any, TokenizedPrompt]] = {}
    for prompt in prompts:
        group = distinct.setdefault(batch_regime(host, len(prompt.tokens)), {})
        group.setdefault((prompt.tokens, prompt.read_pos), prompt)
    ran = {
        key: captured
        for group in distinct.values()
        for key, captured in zip(group, _run(host, [*group.values()], padding_side), strict=True)
    }
    refuse_non_finite(ran.values())
    return [replace(ran[prompt.tokens, prompt.read_pos], prompt=prompt) for prompt in prompts]


def capture_rows(
    host: Host, prompts: Sequence[TokenizedPrompt], hooks: Sequence[Hook]
) -> list[Capture]:
    """What happened in each row of one forward pass with ``hooks`` in force: row i is prompt i.

    Every prompt has a row of its own, for hooks may edit each row in another way; shorter ones are
    padded on the right. What hooks edit is captured as edited. The prompts must be of one
    ``batch_regime``.

    Raises:
        NonFiniteError: If an activation is NaN or infinite, naming the prompt and the first layer.

    Cost: one forward pass of that many rows; memory for the captures.
    """
    rows = [prompt.tokens for prompt in prompts]
    places = [_Place(row, 0, prompt.read_pos) for row, prompt in enumerate(prompts)]
    captures = _pass(host, rows, prompts, places, "right", hooks)
    refuse_non_finite(captures)
    return captures


def check_same_run(host: Host, captured: Capture, resid_final: Float[Tensor, " d_model"]) -> None:
    """Stop where a new run of a captured prompt is not the one captured.

    Raises:
        InputError: If its last residual differs by more than rounding.
    """
    error = _relative(resid_final.to(captured.resid_final), captured.resid_final)
    if not error <= _SAME_RUN[host.dtype]:
        raise _other_run(captured.prompt, "last residuals", error)


def capture_sources(
    host: Host, captured: Capture, positions: Iterable[int], cache: Any = None
) -> Sources:
    """What happened at ``positions`` of the run that ``captured`` is of.

    The same tokens are run again, copying what these positions need, or it is read from ``cache``
    (the ``ActivationCache`` of exactly these tokens). The model is left as it was.

    Raises:
        InputError: If a position comes after the read position; if ``cache`` lacks an activation
            or is of other tokens; or if the run is not the one captured: the model's weights, or
            the caller's hooks, are no longer what they were.

    Cost: one forward pass; memory for the fields of ``Sources``.
    """
    prompt = captured.prompt
    places = sorted(set(positions))
    if places and not 0 <= places[0] <= places[-1] <= prompt.read_pos:
        raise InputError(
            f"source position {places[-1] if places[0] >= 0 else places[0]} is out of range: the "
            f"read position is {prompt.read_pos}, so source positions are 0 to {prompt.read_pos}"
        )
    # on the CPU: layers may be on several devices, and each of them can be indexed from there
    rows = torch.tensor(places, dtype=torch.long)
    kinds = (*SOURCED, *OF_EXPERTS, "v")
    wanted = {key: name for key, name in _wanted(host).items() if _kind(key) in kinds}
    seen: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any, *, key: str) -> None:
        edited = edited_coefficients(activation) if _kind(key) == "mlp_out" else None
        if edited is not None:
            seen[key.replace("mlp_out", "mlp_post")] = edited[0].detach()[rows]
        row, upto = _in_rows(key, activation, 1)[0].detach(), prompt.read_pos + 1
        if _kind(key) == "v":
            seen[key] = row[:upto].clone()
        elif _kind(key) == "pattern":
            seen[key] = row[:, rows, :upto]  # indexing by a tensor copies
        else:
            seen[key] = row[rows]

    if cache is None:
        hooks = [(name, partial(keep, key=key)) for key, name in wanted.items()]
        forward(host, [prompt.tokens], hooks, [[prompt.read_pos]])
    else:
        if _cache_size(host, cache) != (1, len(prompt.tokens)):
            raise _wrong_length(_cache_size(host, cache)[1], [prompt])
        _check_tokens(host, [prompt], cache, "right", len(prompt.tokens))
        for key, name in wanted.items():
            keep(_with_batch_axis(key, cache[name]), None, key=key)
    like = captured.v  # in its dtype, and where it is
    found = _with_coefficients(host, {key: each.to(like) for key, each in seen.items()})
    tensors = {
        kind: torch.stack([found[f"{kind}.{layer}"] for layer in range(host.n_layers)])
        for kind in (*SOURCED, "v")
        if f"{kind}.0" in found
    }
    error = _relative(tensors.pop("v"), captured.v)
    if not error <= _SAME_RUN[host.dtype]:
        raise _other_run(prompt, "value vectors", error)
    return Sources(positions=rows.to(like.device), **tensors)


def residuals_at(
    host: Host, captured: Capture, positions: Int[Tensor, " position"]
) -> Float[Tensor, "station position d_model"]:
    """The residual stream at ``positions`` of a captured run: entering each block, and at the end.

    Station ``l`` is what enters block ``l``; the last one is what comes out of the last block. At
    the read position they are the capture's own.

    Raises:
        InputError: If the run is not the one captured any more.
        NonFiniteError: If one is NaN or infinite.

    Cost: one forward pass without the unembedding; memory for the result.
    """
    prompt, places = captured.prompt, positions.tolist()
    seen: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any, *, name: str) -> None:
        # the read position's last: it tells whether this is the same run
        at = activation[0, [*places, prompt.read_pos]]
        seen[name] = scoring_copy(at, host.device).to(captured.v)

    names = [hook_names(host, layer)["resid_pre"] for layer in range(host.n_layers)]
    names.append(final_resid_name(host))
    forward(host, [prompt.tokens], [(name, partial(keep, name=name)) for name in names], [[]])
    resid = torch.stack([seen[name] for name in names])
    check_same_run(host, captured, resid[-1, -1])
    if not resid.isfinite().all():
        raise NonFiniteError(
            f"the model's activations are not finite: in {prompt_name(prompt)} the residual stream "
            "at an earlier position holds NaN or infinity; check the weights"
        )
    own = torch.cat([captured.resid_pre, captured.resid_final[None]])
    here = positions.to(own.device) == prompt.read_pos
    return torch.where(here[None, :, None], own[:, None], resid[:, :-1])


def capture_pre_activations(
    host: Host, captured: Capture
) -> dict[str, Float[Tensor, "layer d_mlp"]]:
    """What each FFN neuron computes its coefficient from, at the read position of ``captured``.

    Under ``pre``, or, in a gated FFN, under ``gate`` and ``up``; of experts whether they were
    chosen or not. Cost: one forward pass (of experts also their products with what the FFN read).
    """
    seen: dict[str, list[Tensor]] = {}

    def keep(activation: Tensor, hook: Any, *, key: str) -> None:
        at = activation[0, captured.prompt.read_pos]
        seen.setdefault(key, []).append(scoring_copy(at, host.device))

    def keep_products(activation: Tensor, hook: Any, *, layer: int) -> None:
        read = activation[captured.prompt.read_pos]  # of one row
        for key, (subkeys, _) in host.ffn_inputs(layer).items():
            products = torch.cat([rows @ read for _, rows in blocks_of(subkeys, len(subkeys))])
            seen.setdefault(key, []).append(scoring_copy(products, host.device))

    layers = range(host.n_layers)
    hooks: list[Hook] = (
        [(hook_names(host, at)["ffn_read"], partial(keep_products, layer=at)) for at in layers]
        if host.n_experts
        else [
            (name, partial(keep, key=key))
            for layer in layers
            for key, name in pre_activation_names(host, layer).items()
        ]
    )
    forward(host, [captured.prompt.tokens], hooks, [[captured.prompt.read_pos]])
    return {key: torch.stack(layers).to(captured.v) for key, layers in seen.items()}


def check_fits(host: Host, mlp_post: Tensor, v: Tensor, resid_pre: Tensor) -> None:
    """Stop where activations cannot be this model's, before they meet its weights.

    Raises:
        InputError: If they are of another number of layers or of other sizes.
    """
    found = (resid_pre.shape[0], resid_pre.shape[1], mlp_post.shape[1], v.shape[3])
    wanted = (host.n_layers, host.d_model, host.d_mlp, host.d_head)
    if found != wanted:
        raise InputError(
            f"the activations are of another model: (layers, d_model, d_mlp, d_head) is {found}, "
            f"this model's is {wanted}"
        )


# --- one batch --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where in a padded batch a prompt is read."""

    row: int
    start: int
    """Where the prompt's own tokens begin: before them is padding."""
    read: int
    """The read position, counted with the padding."""


def _place(row: int, prompt: TokenizedPrompt, length: int, padding_side: PaddingSide) -> _Place:
    start = start_of(prompt.tokens, length, padding_side)
    return _Place(row, start, start + prompt.read_pos)


def _run(
    host: Host, prompts: Sequence[TokenizedPrompt], padding_side: PaddingSide
) -> list[Capture]:
    rows = list(dict.fromkeys(prompt.tokens for prompt in prompts))
    length = max(map(len, rows))
    row_of = {tokens: row for row, tokens in enumerate(rows)}
    places = [_place(row_of[prompt.tokens], prompt, length, padding_side) for prompt in prompts]
    return _pass(host, rows, prompts, places, padding_side)


def _pass(
    host: Host,
    rows: Sequence[tuple[int, ...]],
    prompts: Sequence[TokenizedPrompt],
    places: Sequence[_Place],
    padding_side: PaddingSide,
    hooks: Sequence[Hook] = (),
) -> list[Capture]:
    seen: dict[str, list[Tensor]] = {}

    def keep(activation: Tensor, hook: Any, *, key: str) -> None:
        seen[key] = _copies(key, _in_rows(key, activation, len(rows)), places, host.device)
        edited = edited_coefficients(activation) if _kind(key) == "mlp_out" else None
        if edited is not None:
            post = key.replace("mlp_out", "mlp_post")
            seen[post] = _copies(post, edited, places, host.device)

    # last, so that what the others edit is seen as edited
    keeping = [(name, partial(keep, key=key)) for key, name in _wanted(host).items()]
    # rows that are read in several places take as much width as the one that is in most
    reads = [
        sorted({place.read for place in places if place.row == row}) for row in range(len(rows))
    ]
    logits = forward(host, rows, [*hooks, *keeping], reads, padding_side)
    silent = [name for key, name in _wanted(host).items() if key not in seen]
    if silent:
        raise InputError(
            f"the model's hook {silent[0]!r} did not fire: if this is a copy of a model that had "
            "been run, its hooks are still the other's; load it anew in place of copying it"
        )
    at = [_Place(place.row, 0, reads[place.row].index(place.read)) for place in places]
    seen["logits"] = _copies("logits", logits, at, host.device)
    return _captures(host, prompts, places, seen)


def _read_cache(
    host: Host, prompts: Sequence[TokenizedPrompt], cache: Any, padding_side: PaddingSide
) -> list[Capture]:
    size = _cache_size(host, cache)
    n_rows, length = size
    if n_rows != len(prompts):
        raise InputError(
            f"the cache holds {'1 prompt' if n_rows == 1 else f'a batch of {n_rows} prompts'}, "
            f"but {len(prompts)} {'was' if len(prompts) == 1 else 'were'} given; "
            "row i of the cache must be prompt i"
        )
    if any(len(prompt.tokens) > length for prompt in prompts):
        raise _wrong_length(length, prompts)
    places = [_place(row, prompt, length, padding_side) for row, prompt in enumerate(prompts)]
    _check_tokens(host, prompts, cache, padding_side, length)
    seen: dict[str, list[Tensor]] = {}
    for key, name in _cached(host, cache).items():
        activation = _in_rows(key, _with_batch_axis(key, cache[name]), n_rows)
        if _size(key, activation) != size:
            raise InputError(
                f"the cache is of several runs: {name!r} is of {list(activation.shape)}, which are "
                f"not {n_rows} prompts of {length} tokens; pass the cache of one run"
            )
        seen[key] = _copies(key, activation, places, host.device)
    if "logits" not in seen:
        seen["logits"] = _logits(host, seen["resid_final"])
    elif host.logit_scale != 1 or host.soft_cap is not None:  # the cache has them before that
        seen["logits"] = [final_logits(host, logits) for logits in seen["logits"]]
    return _captures(host, prompts, places, seen)


def _cache_size(host: Host, cache: Any) -> tuple[int, int]:
    """How many prompts and tokens a cache is of, once it is known to hold what is needed."""
    if not hasattr(cache, "keys"):
        raise InputError(
            f"cache must be an ActivationCache, the second thing run_with_cache returns; "
            f"got a {type(cache).__name__}"
        )
    available = set(cache.keys())
    missing = [name for name in _cached(host, cache).values() if name not in available]
    if missing:
        raise InputError(
            f"the cache lacks {len(missing)} activations, e.g. {missing[0]!r}; run_with_cache "
            "without names_filter keeps them all"
        )
    return _size("resid_final", _with_batch_axis("resid_final", cache[final_resid_name(host)]))


def _cached(host: Host, cache: Any) -> dict[str, str]:
    """Key of each activation to read from a cache -> its name there."""
    # logits can be had from the last residual
    name = unembedding_output_name(host)
    return {**_wanted(host), **({"logits": name} if name in set(cache.keys()) else {})}


def _in_rows(key: str, activation: Tensor, n_rows: int) -> Tensor:
    """An activation by row and position: a router sees the positions of all rows in one axis."""
    if _kind(key) not in OF_EXPERTS or activation.ndim == 3:
        return activation
    flat = activation[None] if activation.ndim == 1 else activation  # one position, axis dropped
    return flat.unflatten(0, (n_rows, -1))


def _with_batch_axis(key: str, activation: Tensor) -> Tensor:
    if _kind(key) in OF_EXPERTS:
        return activation  # see _in_rows
    full_rank = 4 if _kind(key) in ("pattern", "v", "z") else 3
    return activation[None] if activation.ndim == full_rank - 1 else activation


def _size(key: str, activation: Tensor) -> tuple[int, int]:
    """How many rows and positions an activation has."""
    return activation.shape[0], activation.shape[2 if _kind(key) == "pattern" else 1]


def _wrong_length(length: int, prompts: Sequence[TokenizedPrompt]) -> InputError:
    which = "the prompt" if len(prompts) == 1 else "the longest prompt"
    longest = max(len(prompt.tokens) for prompt in prompts)
    return InputError(
        f"the cache is of {length} tokens, {which} of {longest}; pass the tokens that were run"
    )


def _check_tokens(
    host: Host,
    prompts: Sequence[TokenizedPrompt],
    cache: Any,
    padding_side: PaddingSide,
    length: int,
) -> None:
    """Stop where a row of ``cache`` is not of its prompt's tokens, as far as the cache tells."""

    def other_tokens(side: PaddingSide) -> TokenizedPrompt | None:
        for row, prompt in enumerate(prompts):
            start = _place(row, prompt, length, side).start
            if not cache_is_of(host, cache, prompt.tokens, row=row, start=start):
                return prompt
        return None

    other = other_tokens(padding_side)
    if other is None:
        return
    other_side: PaddingSide = "right" if padding_side == "left" else "left"
    if other_tokens(other_side) is None:
        raise InputError(
            f"the cache is padded on the {other_side}, not on the {padding_side}; "
            f"pass padding_side={other_side!r}"
        )
    raise InputError(
        f"the cache is of other tokens than {prompt_name(other)}; pass the tokens that were run"
    )


def _logits(
    host: Host, resid_final: Sequence[Float[Tensor, " d_model"]]
) -> list[Float[Tensor, " d_vocab"]]:
    """The model's logits from its last residuals."""
    with torch.no_grad():
        resid = torch.stack([*resid_final]).to(host.device, host.dtype)[None]
        logits = final_logits(host, host.model.unembed(host.model.ln_final(resid))[0])
        return [scoring_copy(row, host.device) for row in logits]


def _wanted(host: Host) -> dict[str, str]:
    """Key of each activation to keep -> the hook it comes from."""
    wanted = {
        f"{key}.{layer}": name
        for layer in range(host.n_layers)
        for key, name in hook_names(host, layer).items()
    }
    wanted["resid_final"] = final_resid_name(host)
    return wanted


def _kind(key: str) -> str:
    return key.split(".")[0]


def _copies(
    key: str, activation: Tensor, places: Sequence[_Place], device: torch.device
) -> list[Tensor]:
    """What ``key`` keeps of each prompt: views of one copy, which was made for all of them."""
    rows = torch.tensor([place.row for place in places], device=activation.device)
    reads = torch.tensor([place.read for place in places], device=activation.device)
    activation = activation.detach()
    if _kind(key) == "pattern":
        kept = activation[rows, :, reads]  # indexing by a tensor copies
    elif _kind(key) == "v":
        kept = activation[rows]
    else:
        kept = activation[rows, reads]
    wide = torch.promote_types(kept.dtype, torch.float32)
    of_prompts = kept.to(device, wide).unbind()
    if _kind(key) not in ("pattern", "v"):
        return list(of_prompts)
    return [_trimmed(key, place, row) for place, row in zip(places, of_prompts, strict=True)]


def _trimmed(key: str, place: _Place, row: Tensor) -> Tensor:
    if _kind(key) == "pattern":  # with padding before the prompt: nothing may attend there
        return row[:, : place.read + 1]
    return row[place.start : place.read + 1]


def _captures(
    host: Host,
    prompts: Sequence[TokenizedPrompt],
    places: Sequence[_Place],
    seen: dict[str, list[Tensor]],
) -> list[Capture]:
    """What was kept of each prompt, layers stacked."""
    stacked = {key: torch.stack(kept) for key, kept in seen.items() if _kind(key) in OF_EXPERTS}
    made = _with_coefficients(host, stacked)
    seen = {**{key: list(of_each) for key, of_each in made.items()}, **seen}
    captures = []
    for number, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        tensors: dict[str, Any] = {
            name: torch.stack([seen[f"{name}.{layer}"][number] for layer in range(host.n_layers)])
            for name in LAYERED
            if f"{name}.0" in seen
        }
        on_padding = tensors["pattern"][:, :, : place.start]
        if (on_padding > 0).any():
            raise InputError(
                f"{prompt_name(prompt)} attends to the padding before it, which changes its "
                "activations; run the batch with an attention_mask, or padded on the right"
            )
        if place.start:
            tensors["pattern"] = tensors["pattern"][:, :, place.start :].clone()
        # not views: one capture must not keep the whole batch
        tensors["resid_final"] = seen["resid_final"][number].clone()
        tensors["logits"] = seen["logits"][number].clone()
        check_fits(host, tensors["mlp_post"], tensors["v"], tensors["resid_pre"])
        captures.append(
            Capture(prompt=prompt, model_name=host.model_name, **{"resid_mid": None, **tensors})
        )
    return captures


def _with_coefficients(host: Host, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was seen, with experts' coefficients in place of what they are made of."""
    found = {key: kept for key, kept in seen.items() if _kind(key) not in OF_EXPERTS}
    for layer in range(host.n_layers):
        mixture = host.mixture(layer)
        if mixture is not None and f"mlp_post.{layer}" not in found:
            read, routing = (seen[f"{kind}.{layer}"] for kind in OF_EXPERTS)
            found[f"mlp_post.{layer}"] = expert_coefficients(mixture, read, routing)
    return found


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def _other_run(prompt: TokenizedPrompt, what: str, error: float) -> InputError:
    return InputError(
        f"{prompt_name(prompt)} no longer gives the activations captured from it ({what} differ by "
        f"{error:.2g} of the largest): the model's weights or hooks have changed; attribute the "
        "prompt again"
    )
