"""START HERE: model + prompt -> Attribution, the whole pipeline in one screen.

host      = open_host(model)              whose model      (host.py)
asked     = tokenize(host, prompt)        what we ask      (prompts.py, host.py)
captured  = capture(host, asked)          what happened    (capture.py)
verify(host, captured)                    is it so         (identities.py)
out       = read_out(host, ...)           what it says     (readout.py)
blocks    = ffn_/attn_decomposition(...)  who wrote what   (decompose.py)
scores    = layer_/head_/neuron_scores    who raised it    (scores.py)
ranked    = top_neurons(...)              the best         (topk.py)
Attribution(...).neurons()                what we report   (attribution.py, tables.py)
"""

import time
import warnings
from collections.abc import Iterable
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from tl_neuron_attr.attribution import Attribution, at_least_one, progress_bar
from tl_neuron_attr.capture import Capture, capture, check_fits
from tl_neuron_attr.decompose import attn_decomposition, ffn_decomposition
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, has_hooks, open_host, resolve_target, tokenize
from tl_neuron_attr.identities import verify
from tl_neuron_attr.prompts import Prompt, Target, as_prompt
from tl_neuron_attr.readout import DEFAULT_BUDGET, Convention, check_read_out, read_out
from tl_neuron_attr.scores import baselines, head_scores, layer_scores
from tl_neuron_attr.topk import top_neurons


def attribute(
    model: Any,
    prompt: str | Iterable[SupportsIndex] | Tensor | Prompt | Capture,
    *,
    target: str | SupportsIndex | None = None,
    position: SupportsIndex | None = None,
    prepend_bos: bool | None = None,
    top: SupportsIndex = 300,
    convention: Convention = "exact",
    dtype: torch.dtype | None = None,
    budget: SupportsIndex = DEFAULT_BUDGET,
    cache: Any = None,
    progress: bool = False,
) -> Attribution:
    """Which layers, heads and neurons raised log p(target) of one prompt, and by how much.

    Args:
        model: A ``TransformerBridge`` or a ``HookedTransformer``; it is left as it was.
        prompt: Text, token ids, a ``Prompt``, or a ``Capture`` taken before (no forward pass).
        target: A token id, or text that is one token; by default the model's own top prediction.
        position: Where the answer is read, by default the last token; negative from the end.
        prepend_bos: Whether text gets a BOS token; by default what TransformerLens does.
        top: How many neurons of each kind to rank.
        convention: How residual vectors are read out (see ``readout.py``).
        dtype: What scores are computed in: float32 by default, whatever the weights are.
        budget: Bytes for the working set of the read-out, 1 GiB by default.
        cache: The ``ActivationCache`` of these very tokens, to use in place of a forward pass.
        progress: Show a progress bar where scoring takes longer than two seconds.

    Raises:
        InputError: For anything wrong with the request, before the forward pass.
        UnsupportedModelError: For an architecture whose neurons would come out wrong.
        NonFiniteError: If the forward pass gives NaN or infinite activations.
        IdentityError: If the model contradicts what this package believes about it.

    Cost: one forward pass, two gradients, and about one read-out per layer, head and neuron
    listed (under ``recomputed``: per neuron there is).
    Source: Yu & Ananiadou (2024), section 3.
    """
    started = time.perf_counter()
    top = at_least_one(top, "top")
    budget = at_least_one(budget, "budget")
    host = open_host(model)
    check_read_out(host, convention, budget, dtype)
    # under a caller's autocast neither activations nor scores would have the precision promised
    with torch.no_grad(), torch.autocast(host.device.type, enabled=False):
        if isinstance(prompt, Capture):
            if (position, prepend_bos, cache) != (None, None, None):
                raise InputError("a Capture carries its own tokens: give only target beside it")
            captured, own_run = prompt, False
            check_fits(host, captured.mlp_post, captured.v, captured.resid_pre)
            asked = None if target is None else resolve_target(host, target)
        else:
            tokens = tokenize(
                host, as_prompt(prompt, target=target, position=position, prepend_bos=prepend_bos)
            )
            asked = tokens.target
            own_run = cache is None and not has_hooks(model)
            captured = capture(host, tokens, cache)
        verify(host, captured, own_run=own_run)
        if dtype is not None:
            captured = captured.to(dtype)
        wanted = asked or captured.prompt.target or _own_top_prediction(host, captured)

        out = read_out(host, captured.resid_final, convention, budget=budget)
        ffns = tuple(ffn_decomposition(host, captured, layer) for layer in range(host.n_layers))
        attns = tuple(attn_decomposition(host, captured, layer) for layer in range(host.n_layers))
        before = baselines(captured, out, wanted.id)
        # certified, one read-out per neuron listed and a few more; else one per neuron there is
        expected = 2 * top if out.affine else sum(b.n_neurons for b in (*ffns, *attns))
        with progress_bar(expected, "neuron", progress) as bar:
            ffn_neurons = top_neurons(
                ffns, out, wanted.id, top, before=before.ffn, progress=bar.update
            )
            attn_neurons = top_neurons(
                attns, out, wanted.id, top, before=before.attn, progress=bar.update
            )
        result = Attribution(
            host=host,
            captured=captured,
            target=wanted,
            convention=convention,
            out=out,
            ffns=ffns,
            attns=attns,
            log_prob=float(out.log_prob(captured.resid_final, wanted.id)),
            embedding_log_prob=float(out.log_prob(captured.resid_pre[0], wanted.id)),
            layer_scores=layer_scores(captured, out, before),
            head_scores=head_scores(attns, out, before.attn),
            ffn_neurons=ffn_neurons,
            attn_neurons=attn_neurons,
            warnings=_warnings(host),
            seconds=time.perf_counter() - started,
        )
    for message in result.warnings:
        warnings.warn(message, stacklevel=2)
    return result


def _own_top_prediction(host: Host, captured: Capture) -> Target:
    token, _ = captured.top_predictions(1)[0]
    return Target(id=token, text=host.token_text(token))


def _warnings(host: Host) -> tuple[str, ...]:
    if not host.value_biases_folded:
        return ()
    how = (
        "do not call enable_compatibility_mode on it, or call it with no_processing=True"
        if host.class_name == "TransformerBridge"
        else "load it with fold_value_biases=False (from_pretrained_no_processing)"
    )
    return (
        "value biases were folded into the attention output's bias, which belongs to no head: the "
        "scores of attention neurons, heads and source positions differ from the raw model's, "
        f"those of layers and FFN neurons do not. To get the raw model: {how}",
    )
