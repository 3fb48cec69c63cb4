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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from tqdm import tqdm

from tl_neuron_attr.attribution import Attribution, at_least_one, progress_bar
from tl_neuron_attr.capture import Capture, capture_all, check_fits
from tl_neuron_attr.decompose import attn_decomposition, ffn_decomposition
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, has_hooks, open_host, resolve_target, tokenize
from tl_neuron_attr.identities import verify
from tl_neuron_attr.index import ProjectionIndex, check_index
from tl_neuron_attr.prompts import (
    PaddingSide,
    Prompt,
    Question,
    Target,
    TokenizedPrompt,
    as_prompt,
    as_questions,
)
from tl_neuron_attr.readout import DEFAULT_BUDGET, Convention, check_read_out, read_out
from tl_neuron_attr.scores import baselines_of_runs, head_scores, layer_scores
from tl_neuron_attr.topk import top_neurons_of_runs


def attribute(
    model: Any,
    prompt: str | Iterable[SupportsIndex] | Tensor | Prompt | Capture,
    *,
    target: str | SupportsIndex | None = None,
    against: str | SupportsIndex | None = None,
    position: SupportsIndex | None = None,
    prepend_bos: bool | None = None,
    top: SupportsIndex = 300,
    convention: Convention = "exact",
    dtype: torch.dtype | None = None,
    budget: SupportsIndex = DEFAULT_BUDGET,
    cache: Any = None,
    index: ProjectionIndex | None = None,
    progress: bool = False,
) -> Attribution:
    """Which layers, heads and neurons raised log p(target) of one prompt, and by how much.

    Args:
        model: A ``TransformerBridge`` or a ``HookedTransformer``; it is left as it was.
        prompt: Text, token ids, a ``Prompt``, or a ``Capture`` taken before (no forward pass).
        target: A token id, or text that is one token; by default the model's own top prediction.
        against: A second token, for a contrast: scores are then rises in
            log p(target) - log p(against), linear in each contribution (unless recomputed).
        position: Where the answer is read, by default the last token; negative from the end.
        prepend_bos: Whether text gets a BOS token; by default what TransformerLens does.
        top: How many neurons of each kind to rank.
        convention: How residual vectors are read out (see ``readout.py``).
        dtype: What scores are computed in: float32 by default, whatever the weights are.
        budget: Bytes for the working set of the read-out, 1 GiB by default.
        cache: The ``ActivationCache`` of these very tokens, to use in place of a forward pass.
        index: The model's projection index, for ``suppressing``, ``shares`` and token lists.
        progress: Show a progress bar where scoring takes longer than two seconds.

    Raises:
        InputError: For anything wrong with the request, before the forward pass.
        UnsupportedModelError: For an architecture whose neurons would come out wrong.
        NonFiniteError: If the forward pass gives NaN or infinite activations.
        IdentityError: If the model contradicts what this package believes about it.

    Cost: one forward pass, a gradient, and about one read-out per layer, head and neuron listed
    (under ``recomputed``: per neuron there is).
    Source: Yu & Ananiadou (2024), section 3.
    """
    if isinstance(prompt, Capture):
        if (position, prepend_bos, cache) != (None, None, None):
            raise InputError("a Capture carries its own tokens: give only target beside it")
        question: Prompt | Capture = prompt
    else:
        question = as_prompt(
            prompt, target=target, against=against, position=position, prepend_bos=prepend_bos
        )
        target = against = None
    return attribute_all(
        model,
        [question],
        target=target,
        against=against,
        top=top,
        convention=convention,
        dtype=dtype,
        budget=budget,
        cache=cache,
        index=index,
        progress=progress,
    )[0]


def attribute_all(
    model: Any,
    prompts: str | Prompt | Capture | Tensor | Iterable[Any],
    *,
    target: str | SupportsIndex | Sequence[str | SupportsIndex | None] | None = None,
    against: str | SupportsIndex | Sequence[str | SupportsIndex | None] | None = None,
    prepend_bos: bool | None = None,
    top: SupportsIndex = 300,
    convention: Convention = "exact",
    dtype: torch.dtype | None = None,
    budget: SupportsIndex = DEFAULT_BUDGET,
    batch_size: SupportsIndex = 16,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    index: ProjectionIndex | None = None,
    progress: bool = False,
) -> list[Attribution]:
    """The same for several prompts, several targets, or both: one result each, in their order.

    Prompts are run together, up to ``batch_size`` of about the same length, and scored together;
    a prompt asked about several targets is run once. No score depends on what else is in a batch,
    or on padding, beyond rounding.

    Args:
        prompts: Whatever ``attribute`` takes, several times; or one prompt, with several targets;
            or token ids of shape [batch, pos], padded or not.
        target: One for all prompts, or one for each; as in ``attribute``.
        against: Likewise.
        attention_mask: 1 for tokens and 0 for padding, beside ids of shape [batch, pos].
        cache: The ``ActivationCache`` of exactly those padded ids, in place of forward passes.
        batch_size: At most so many prompts in a forward pass; fewer where their predictions would
            not fit into ``budget``.

    The other arguments, errors and costs are those of ``attribute``.
    """
    started = time.perf_counter()
    top = at_least_one(top, "top")
    budget = at_least_one(budget, "budget")
    batch_size = at_least_one(batch_size, "batch_size")
    host = open_host(model)
    check_read_out(host, convention, budget, dtype)
    if index is not None:
        check_index(host, index)
    questions, padding_side = as_questions(
        prompts, target=target, against=against, attention_mask=attention_mask
    )
    asked = [_tokenized(host, question, prepend_bos) for question in questions]
    # two baselines a layer for each prompt, and what the survey makes of them on the way
    per_prompt = 4 * host.n_layers * host.d_vocab * torch.finfo(host.dtype).bits // 8
    batch_size = max(1, min(batch_size, budget // per_prompt))
    results: list[Attribution | None] = [None] * len(asked)
    # under a caller's autocast neither activations nor scores would have the precision promised
    with (
        torch.no_grad(),
        torch.autocast(host.device.type, enabled=False),
        progress_bar(2 * top * len(asked), "neuron", progress) as bar,
    ):
        # a cache has its prompts in their order, in one batch
        batches = _batches(asked, batch_size) if cache is None else [list(range(len(asked)))]
        for batch in batches:
            captures = _captured(host, [asked[place] for place in batch], cache, padding_side)
            targets = [
                captured.prompt.target or _own_top_prediction(host, captured)
                for captured in captures
            ]
            for contrast in (False, True):
                some = [
                    number
                    for number, wanted in enumerate(targets)
                    if (wanted.against is not None) == contrast
                ]
                if not some:
                    continue
                found = _scored(
                    host,
                    [captures[number] for number in some],
                    [targets[number] for number in some],
                    convention=convention,
                    dtype=dtype,
                    budget=budget,
                    top=top,
                    bar=bar,
                )
                for number, result in zip(some, found, strict=True):
                    results[batch[number]] = result
    seconds = (time.perf_counter() - started) / len(asked)
    for message in _warnings(host):
        warnings.warn(message, stacklevel=2)
    return [
        replace(result, seconds=seconds, index=index) for result in results if result is not None
    ]


# --- the pipeline, for one batch --------------------------------------------------------------


def _tokenized(
    host: Host, question: Question, prepend_bos: bool | None
) -> TokenizedPrompt | Capture:
    """What is asked, as the model sees it; a capture with the target it is asked about now."""
    if not isinstance(question.prompt, Capture):
        prompt = as_prompt(
            question.prompt,
            target=question.target,
            against=question.against,
            prepend_bos=prepend_bos,
            prompt_id=question.prompt_id,
        )
        return tokenize(host, prompt)
    captured = question.prompt
    check_fits(host, captured.mlp_post, captured.v, captured.resid_pre)
    if question.target is None and question.against is None:
        return captured
    target = resolve_target(host, question.target, question.against)
    return replace(captured, prompt=replace(captured.prompt, target=target))


def _batches(asked: Sequence[TokenizedPrompt | Capture], batch_size: int) -> Iterator[list[int]]:
    """Places of prompts to run together: of about the same length, so that little is padding."""
    prompts = [each.prompt if isinstance(each, Capture) else each for each in asked]
    order = sorted(range(len(asked)), key=lambda place: len(prompts[place].tokens))
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def _in_dtype(captures: Sequence[Capture], dtype: torch.dtype) -> list[Capture]:
    """The captures in ``dtype``; those that shared their activations still do."""
    converted: dict[int, Capture] = {}
    results = []
    for captured in captures:
        if id(captured.resid_pre) not in converted:
            converted[id(captured.resid_pre)] = captured.to(dtype)
        results.append(replace(converted[id(captured.resid_pre)], prompt=captured.prompt))
    return results


def _captured(
    host: Host,
    asked: Sequence[TokenizedPrompt | Capture],
    cache: Any,
    padding_side: PaddingSide,
) -> list[Capture]:
    """What happened in each prompt: run now, or read from what was given, and verified."""
    tokens = [prompt for prompt in asked if isinstance(prompt, TokenizedPrompt)]
    own_run = cache is None and not has_hooks(host.model)
    if cache is None:
        # scores do not depend on where padding is; on the right it needs no care
        ran = capture_all(host, tokens) if tokens else []
    else:
        ran = capture_all(host, tokens, cache, padding_side=padding_side)
    for number, captured in enumerate(ran):
        if number == 0 or not own_run:
            verify(host, captured, own_run=own_run)
    runs = iter(ran)
    captures = [prompt if isinstance(prompt, Capture) else next(runs) for prompt in asked]
    for captured, prompt in zip(captures, asked, strict=True):
        if captured is prompt:
            verify(host, captured)
    return captures


def _scored(
    host: Host,
    captures: Sequence[Capture],
    targets: Sequence[Target],
    *,
    convention: Convention,
    dtype: torch.dtype | None,
    budget: int,
    top: int,
    bar: tqdm,
) -> list[Attribution]:
    """Scores of layers, heads and the best neurons for each capture and its target."""
    if dtype is not None:
        captures = _in_dtype(captures, dtype)
    outs = [read_out(host, run.resid_final, convention, budget=budget) for run in captures]
    layers = range(host.n_layers)
    ffns = [tuple(ffn_decomposition(host, run, layer) for layer in layers) for run in captures]
    attns = [tuple(attn_decomposition(host, run, layer) for layer in layers) for run in captures]
    before = baselines_of_runs(captures, outs, targets)
    layer_results = layer_scores(captures, outs[0], before)
    head_results = head_scores(attns, outs[0], before.attn)
    ffn_results = top_neurons_of_runs(ffns, outs[0], before.ffn, top, progress=bar.update)
    attn_results = top_neurons_of_runs(attns, outs[0], before.attn, top, progress=bar.update)
    return [
        Attribution(
            host=host,
            captured=captured,
            target=targets[number],
            convention=convention,
            out=outs[number],
            ffns=ffns[number],
            attns=attns[number],
            log_prob=float(before.final.log_prob[number]),
            embedding_log_prob=float(before.attn.log_prob[number * host.n_layers]),
            layer_scores=layer_results[number],
            head_scores=head_results[number],
            ffn_neurons=ffn_results[number],
            attn_neurons=attn_results[number],
            warnings=_warnings(host),
            seconds=0.0,
        )
        for number, captured in enumerate(captures)
    ]


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
