"""Forward passes with hooks in force: several prompts padded to one length, and what is edited."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.captured import prompt_name
from tl_neuron_attr.errors import NonFiniteError
from tl_neuron_attr.experts import coefficients as expert_coefficients
from tl_neuron_attr.hook_points import (
    ROUTER_HOOKS,
    block_outputs,
    coefficient_name,
    final_resid_name,
    has_hooks,
    hook_names,
    last_ffn_input_name,
    starting_at,
    unembedding_input_name,
)
from tl_neuron_attr.host import Host, check_left_padding
from tl_neuron_attr.pieces import times
from tl_neuron_attr.prompts import PaddingSide, TokenizedPrompt

Hook = tuple[str, Callable[..., Any]]
"""The name of a hook, and what is called there with the activation and the hook point."""

OF_EXPERTS = tuple(ROUTER_HOOKS)
"""What ``mlp_post`` of a mixture of experts is made of."""

_TOKENS_AT_A_TIME = 4096  # enough for matrix products to run at full speed

_EDITED = "tl_neuron_attr.edited_coefficients"


def forward(
    host: Host,
    rows: Sequence[tuple[int, ...]],
    hooks: Sequence[Hook],
    reads: Sequence[Sequence[int]],
    padding_side: PaddingSide = "right",
    *,
    differentiable: bool = False,
) -> Float[Tensor, "row read d_vocab"]:
    """The logits at each row's positions ``reads`` from one forward pass, ``hooks`` in force.

    The rows of tokens are padded to one length, with which positions are counted. Nothing else is
    unembedded, unless the caller has hooks on the model.
    """
    length = max(map(len, rows))
    padded = any(len(row) < length for row in rows)
    if padded and padding_side == "left":
        check_left_padding(host)
    tokens, attention_mask = (t.to(host.input_device) for t in _padded(rows, length, padding_side))
    # Both classes derive positions from the mask. HookedTransformer gets one even where nothing
    # is padded: if its tokenizer pads on the left, it takes pad tokens in the prompt for padding.
    masked = padded or host.class_name == "HookedTransformer"
    width = max(map(len, reads))
    kept = torch.tensor(
        [[*row, *[row[0]] * (width - len(row))] if row else [] for row in reads], dtype=torch.long
    )
    each_row = torch.arange(len(rows))[:, None]

    def narrow(activation: Tensor, hook: Any) -> Tensor:
        return activation[each_row, kept]

    narrowed = not has_hooks(host.model)  # the caller's may look at all of them
    if narrowed:
        hooks = [*hooks, (unembedding_input_name(host), narrow)]
    with torch.set_grad_enabled(differentiable):
        logits = host.model.run_with_hooks(
            tokens,
            return_type="logits",
            fwd_hooks=list(hooks),
            attention_mask=attention_mask if masked else None,
        )
        return logits if narrowed else logits[each_row, kept]


def tokens_at_a_time(host: Host, kind: Literal["ffn", "attn"]) -> int:
    """Rows times positions of one forward pass in which neurons of many positions are edited.

    Fewer for FFN neurons of a mixture of experts: an edit holds the coefficients of all experts'
    neurons, of which the model itself makes those of the chosen ones.
    """
    if kind == "attn" or not host.n_experts:
        return _TOKENS_AT_A_TIME
    return max(1, _TOKENS_AT_A_TIME * host.experts_per_position // host.n_experts)


def run_rows(host: Host, prompts: Sequence[TokenizedPrompt], hooks: Sequence[Hook]) -> None:
    """One forward pass for what ``hooks`` see in it: row i is prompt i, padded on the right.

    Nothing is kept and nothing unembedded. The prompts must be of one ``batch_regime``.
    """
    forward(host, [prompt.tokens for prompt in prompts], hooks, [[]] * len(prompts))


def capture_blocks(host: Host, prompt: TokenizedPrompt) -> list[Any]:
    """What each block returned in a run of ``prompt``, for ``final_residuals`` to start from.

    Cost: one forward pass; a residual vector for each layer and position.
    """
    with block_outputs(host) as outputs:
        forward(host, [prompt.tokens], _last_ffn_hooks(host, [prompt]), [[]])
    return [*outputs]


def final_residuals(
    host: Host,
    prompts: Sequence[TokenizedPrompt],
    hooks: Sequence[Hook] = (),
    *,
    start: tuple[int, Sequence[Any]] | None = None,
    differentiable: bool = False,
) -> Float[Tensor, "row d_model"]:
    """The residual stream after the last block, at each prompt's read position; rows as above.

    ``start`` is a layer and the outputs of ``capture_blocks``: all rows are then runs of that
    prompt, and what comes before the layer is taken from there. ``differentiable`` keeps the graph
    that leads from what hooks put in to the result; hooks then see every layer at all positions.

    Raises:
        NonFiniteError: If one is NaN or infinite.

    Cost: one forward pass of that many rows, from that layer on, without the unembedding, and
    without the last FFN's other positions (with the caller's own hooks on the model, with both).
    """
    seen: list[Tensor] = []
    rows = torch.arange(len(prompts))
    reads = torch.tensor([prompt.read_pos for prompt in prompts])

    def keep(activation: Tensor, hook: Any) -> None:
        resid = activation[rows, reads]
        wide = torch.promote_types(resid.dtype, torch.float32)
        seen.append(
            resid.to(host.device, wide) if differentiable else scoring_copy(resid, host.device)
        )

    sparing = [] if differentiable else _last_ffn_hooks(host, prompts)
    every = [*hooks, *sparing, (final_resid_name(host), keep)]
    layer, outputs = (0, []) if start is None else start
    tokens = [prompt.tokens for prompt in prompts]
    with starting_at(host, layer, outputs, len(prompts)):
        forward(host, tokens, every, [[]] * len(prompts), differentiable=differentiable)
    finite = seen[0].detach().isfinite().all(-1)
    if not finite.all():
        first = prompts[int(finite.int().argmin())]
        raise NonFiniteError(
            f"the model's activations are not finite: in {prompt_name(first)}, edited, what comes "
            "out of the last block holds NaN or infinity"
        )
    return seen[0]


def coefficients_everywhere(
    host: Host, prompt: TokenizedPrompt, kind: Literal["ffn", "attn"]
) -> Float[Tensor, "layer pos neuron"]:
    """The coefficient of every neuron at every position: of attention neurons, ``z``.

    Attention neurons are numbered by head, then index. Cost: one forward pass.
    """
    seen: dict[int, Tensor] = {}

    def keep(activation: Tensor, hook: Any, *, layer: int) -> None:
        seen[layer] = scoring_copy(activation[0].flatten(1), host.device)

    layers = range(host.n_layers)
    hooks = [
        hook for at in layers for hook in coefficient_hooks(host, at, kind, partial(keep, layer=at))
    ]
    forward(host, [prompt.tokens], hooks, [[]])
    return torch.stack([seen[layer] for layer in layers])


def coefficient_hooks(
    host: Host,
    layer: int,
    kind: Literal["ffn", "attn"],
    use: Callable[[Tensor, Any], Tensor | None],
) -> list[Hook]:
    """Hooks that show ``use`` all coefficients of a layer, which it may give back edited.

    Of FFN neurons by row, position and neuron; of attention neurons ``z``. In a mixture of experts
    they are no activation: they are made of what the FFN reads and its router gives (at least
    float32), and what an edit makes of them is added to what the FFN writes. Cost there: that of
    the chosen experts' gate and up products, a float for each neuron and position; of an edit also
    a product with the rows of experts it changes.
    """
    mixture = host.mixture(layer) if kind == "ffn" else None
    if mixture is None:
        return [(coefficient_name(host, layer, kind), use)]
    names = hook_names(host, layer)
    seen: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any, *, name: str) -> None:
        seen[name] = activation

    def edit(written: Tensor, hook: Any) -> Tensor | None:
        read, routing = (seen.pop(name).flatten(0, -2) for name in OF_EXPERTS)
        made = edited_coefficients(written)
        if made is None:
            read = read.to(torch.promote_types(read.dtype, torch.float32))
            made = expert_coefficients(mixture, read, routing).unflatten(0, written.shape[:2])
        edited = use(made, hook)
        if edited is None:
            return None
        result = written + times(edited - made, mixture.down).to(written)
        vars(result)[_EDITED] = edited  # for the hooks that come after
        return result

    keeping = [(names[name], partial(keep, name=name)) for name in OF_EXPERTS]
    return [*keeping, (names["mlp_out"], edit)]


def edited_coefficients(written: Tensor) -> Tensor | None:
    """What an edit before made of the experts' coefficients, which it left on what the FFN wrote.

    No activation of the model holds them. A hook of the caller's own in between makes a tensor
    without them: then they are those of the run, as for every hook that edits what an FFN wrote.
    """
    return vars(written).get(_EDITED)


def _last_ffn_hooks(host: Host, prompts: Sequence[TokenizedPrompt]) -> list[Hook]:
    """A hook that spares the last FFN at positions nobody looks at."""
    name = last_ffn_input_name(host)
    if name is None or has_hooks(host.model):  # the caller's may look at it
        return []
    rows = torch.arange(len(prompts))
    reads = torch.tensor([prompt.read_pos for prompt in prompts])

    def at_read_positions(activation: Tensor, hook: Any) -> Tensor:
        return activation[rows, reads][:, None]

    return [(name, at_read_positions)]


def _padded(
    rows: Sequence[tuple[int, ...]], length: int, padding_side: PaddingSide
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Token ids of equal length, and an attention mask: 1 for tokens, 0 for padding."""
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, tokens in enumerate(rows):
        start = start_of(tokens, length, padding_side)
        # Any id would do, but this one surely embeds to something finite, if the prompt does:
        # attention gives padding a weight of 0, and 0 times NaN is NaN.
        ids[number] = tokens[-1]
        ids[number, start : start + len(tokens)] = torch.tensor(tokens)
        mask[number, start : start + len(tokens)] = 1
    return ids, mask


def start_of(tokens: tuple[int, ...], length: int, padding_side: PaddingSide) -> int:
    """Where a row's own tokens begin: before them is padding."""
    return length - len(tokens) if padding_side == "left" else 0


def scoring_copy(activation: Tensor, device: torch.device) -> Tensor:
    """A copy (the original may be overwritten) in at least float32, on ``device``."""
    dtype = torch.promote_types(activation.dtype, torch.float32)
    return activation.detach().to(device, dtype, copy=True)
