"""START HERE: model + prompt -> Attribution, the whole pipeline in one screen.

host      = open_host(model)              whose model      (host.py)
asked     = tokenize(host, prompt)        what we ask      (prompts.py, targets.py)
captured  = capture(host, asked)          what happened    (capture.py)
verify(host, captured)                    is it so         (identities.py)
out       = read_out(host, ...)           what it says     (readout.py)
blocks    = ffn_/attn_decompositions(...) who wrote what   (decompose.py)
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

from tl_neuron_attr.attribution import Attribution, progress_bar
from tl_neuron_attr.capture import capture_all, check_fits
from tl_neuron_attr.captured import Capture
from tl_neuron_attr.decompose import attn_decompositions, ffn_decompositions
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.hook_points import has_hooks
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.identities import verify
from tl_neuron_attr.index import ProjectionIndex, check_index
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import (
    Answer,
    PaddingSide,
    Prompt,
    Question,
    Target,
    TokenizedPrompt,
    as_answer,
    as_prompt,
    as_questions,
    at_least_one,
)
from tl_neuron_attr.readout import DEFAULT_BUDGET, Convention, check_read_out, read_out
from tl_neuron_attr.scores import baselines_of_runs, head_scores, layer_scores
from tl_neuron_attr.targets import of_distribution, resolve_target, space_warnings, tokenize
from tl_neuron_attr.topk import top_neurons_of_runs


def attribute(
    model: Any,
    prompt: str | Iterable[SupportsIndex] | Tensor | Prompt | Capture,
    *,
    target: Answer | None = None,
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
        target: A token id, or text that is one token; by default the model's own top prediction. A
            set, or a list, of these: several accepted answers, whose probabilities are summed. A
            ``Distribution``: a whole prediction, by default the model's own.
        against: A second token, for a contrast: scores are then rises in
            log p(target) - log p(against), linear in each contribution (unless the norm is
            recomputed, or logits pass through a soft cap).
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
        target = as_answer(target)  # a list would be several targets, one for each result
        question: Prompt | Capture = prompt
    else:
        question = as_prompt(
            prompt, target=target, against=against, position=position, prepend_bos=prepend_bos
        )
        target = against = None
    (result,) = _results(
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
    )
    for message in result.warnings:
        warnings.warn(message, stacklevel=2)
    return result


def attribute_all(
    model: Any,
    prompts: str | Prompt | Capture | Tensor | Iterable[Any],
    *,
    target: Answer | Sequence[Answer | None] | None = None,
    against: str | SupportsIndex | Sequence[str | SupportsIndex | None] | None = None,
    prepend_bos: bool | None = None,
    top: SupportsIndex = 300,
    convention: Convention = "exact",
    dtype: torch.dtype | None = None,
    budget: SupportsIndex = DEFAULT_BUDGET,
    batch_size: SupportsIndex = 16,
    attention_mask: Any = None,
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
        target: One for all prompts, or a list of one for each; as in ``attribute``, but several
            accepted answers are a set.
        against: Likewise.
        attention_mask: 1 for tokens and 0 for padding, beside ids of shape [batch, pos]; without
            it every id counts as a token.
        cache: The ``ActivationCache`` of exactly those padded ids, in place of forward passes.
        batch_size: At most so many prompts in a forward pass; fewer where their predictions would
            not fit into ``budget``.

    The other arguments, errors and costs are those of ``attribute``.
    """
    results = _results(
        model,
        prompts,
        target=target,
        against=against,
        prepend_bos=prepend_bos,
        top=top,
        convention=convention,
        dtype=dtype,
        budget=budget,
        batch_size=batch_size,
        attention_mask=attention_mask,
        cache=cache,
        index=index,
        progress=progress,
    )
    for message in dict.fromkeys(message for result in results for message in result.warnings):
        warnings.warn(message, stacklevel=2)
    return results


def _results(
    model: Any,
    prompts: Any,
    *,
    target: Any,
    against: Any,
    top: SupportsIndex,
    convention: Convention,
    dtype: torch.dtype | None,
    budget: SupportsIndex,
    cache: Any,
    index: Any,
    progress: bool,
    prepend_bos: bool | None = None,
    batch_size: SupportsIndex = 1,
    attention_mask: Any = None,
) -> list[Attribution]:
    started = time.perf_counter()
    top = at_least_one(top, "top")
    budget = at_least_one(budget, "budget")
    batch_size = at_least_one(batch_size, "batch_size")
    host = open_host(model)
    check_read_out(host, convention, budget, dtype)
    if index is not None:
        if not isinstance(index, ProjectionIndex):
            raise InputError(
                f"index must be a ProjectionIndex, got a {type(index).__name__}; "
                "make one with projection_index(model, directory)"
            )
        check_index(host, index)
    questions, padding_side = as_questions(
        prompts, target=target, against=against, attention_mask=attention_mask
    )
    asked = [_tokenized(host, question, prepend_bos) for question in questions]
    # two baselines a layer for each prompt, and what the survey makes of them on the way
    scoring = dtype or torch.promote_types(host.dtype, torch.float32)
    per_prompt = 4 * host.n_layers * host.d_vocab * scoring.itemsize
    batch_size = max(1, min(batch_size, budget // per_prompt))
    captures: dict[int, Capture] = {}
    results: dict[int, Attribution] = {}
    with (
        torch.no_grad(),
        full_precision(),
        progress_bar(2 * top * len(asked), "neuron", progress) as bar,
    ):
        if cache is not None:  # it has its prompts in their order, in one batch
            rows = [question.row for question in questions]
            captures = dict(enumerate(_cached(host, asked, rows, cache, padding_side)))
        for batch in _batches(asked, batch_size):
            if cache is None:
                ran = _captured(host, [asked[place] for place in batch])
                captures = dict(zip(batch, ran, strict=True))
            for some in _alike([captures[place] for place in batch]):
                places = [batch[number] for number in some]
                found = _scored(
                    host,
                    [captures[place] for place in places],
                    convention=convention,
                    dtype=dtype,
                    budget=budget,
                    top=top,
                    bar=bar,
                )
                results |= dict(zip(places, found, strict=True))
    seconds = (time.perf_counter() - started) / len(asked)
    return [replace(results[place], seconds=seconds, index=index) for place in range(len(asked))]


# --- the pipeline, for one batch --------------------------------------------------------------


def _tokenized(
    host: Host, question: Question, prepend_bos: bool | None
) -> TokenizedPrompt | Capture:
    """What is asked, as the model sees it; a capture with the target it is asked about now."""
    if not isinstance(question.prompt, Capture):
        return tokenize(host, question.as_prompt(prepend_bos))
    captured = question.prompt
    check_fits(host, captured.mlp_post, captured.v, captured.resid_pre)
    if question.target is None and question.against is None:
        return captured
    target = resolve_target(host, question.target, question.against)
    return replace(captured, prompt=replace(captured.prompt, target=target))


def _batches(asked: Sequence[TokenizedPrompt | Capture], batch_size: int) -> Iterator[list[int]]:
    """Places of what is asked together: so many prompts of about the same length, all targets."""
    same: dict[Any, list[int]] = {}
    for place, each in enumerate(asked):
        captured = isinstance(each, Capture)
        key = id(each.resid_pre) if captured else (each.tokens, each.read_pos)
        same.setdefault(key, []).append(place)

    def length(places: list[int]) -> int:
        first = asked[places[0]]
        return len((first.prompt if isinstance(first, Capture) else first).tokens)

    groups = sorted(same.values(), key=length)
    for first in range(0, len(groups), batch_size):
        yield [place for places in groups[first : first + batch_size] for place in places]


def _alike(captures: Sequence[Capture]) -> list[list[int]]:
    """Those that can be scored together: targets of one kind, in one precision."""
    alike: dict[Any, list[int]] = {}
    for number, captured in enumerate(captures):
        target = captured.prompt.target
        form = (target or Target(id=0)).form
        alike.setdefault((form, captured.resid_pre.dtype), []).append(number)
    return [*alike.values()]


def _converted(captures: Sequence[Capture], where: torch.dtype | torch.device) -> list[Capture]:
    """The captures in a dtype, or on a device; those that shared their activations still do."""
    converted: dict[int, Capture] = {}
    results = []
    for captured in captures:
        if id(captured.resid_pre) not in converted:
            converted[id(captured.resid_pre)] = captured.to(where)
        results.append(replace(converted[id(captured.resid_pre)], prompt=captured.prompt))
    return results


def _captured(host: Host, asked: Sequence[TokenizedPrompt | Capture]) -> list[Capture]:
    """What happened in each prompt, run now or given, and verified."""
    tokens = [prompt for prompt in asked if isinstance(prompt, TokenizedPrompt)]
    own_run = not has_hooks(host.model)
    # scores do not depend on where padding is; on the right it needs no care
    ran = capture_all(host, tokens) if tokens else []
    _verify_all(host, ran[:1] if own_run else ran, own_run=own_run)
    # they may have been taken, or read from disk, on another device
    given = _converted([each for each in asked if isinstance(each, Capture)], host.device)
    _verify_all(host, given, own_run=False)
    runs, theirs = iter(ran), iter(given)
    return [next(theirs) if isinstance(prompt, Capture) else next(runs) for prompt in asked]


def _cached(
    host: Host,
    asked: Sequence[TokenizedPrompt | Capture],
    rows: Sequence[int],
    cache: Any,
    padding_side: PaddingSide,
) -> list[Capture]:
    """The same from a cache: its row i is the i-th prompt, whatever targets that is asked about."""
    prompts = [prompt for prompt in asked if isinstance(prompt, TokenizedPrompt)]
    if len(prompts) < len(asked):
        raise InputError("a Capture carries its own tokens: leave the cache out")
    firsts = [prompts[rows.index(row)] for row in sorted(set(rows))]
    captures = capture_all(host, firsts, cache, padding_side=padding_side)
    _verify_all(host, captures, own_run=False)
    return [replace(captures[row], prompt=each) for row, each in zip(rows, prompts, strict=True)]


def _verify_all(host: Host, captures: Sequence[Capture], *, own_run: bool) -> None:
    """Every identity of each run, once however many targets it is asked about."""
    for captured in {id(captured.resid_pre): captured for captured in captures}.values():
        verify(host, captured, own_run=own_run)


def _scored(
    host: Host,
    captures: Sequence[Capture],
    *,
    convention: Convention,
    dtype: torch.dtype | None,
    budget: int,
    top: int,
    bar: tqdm,
) -> list[Attribution]:
    """Scores of layers, heads and the best neurons for each capture and its target."""
    targets = [_target_of(host, each) for each in captures]
    if dtype is not None:
        captures = _converted(captures, dtype)
    out = read_out(host, captures[0].resid_final, convention, budget=budget)
    outs = [out.frozen_at(run.resid_final) for run in captures]
    ffns, attns = ffn_decompositions(host, captures), attn_decompositions(host, captures)
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
            log_prob=_settled(float(before.final.log_prob[number]), targets[number]),
            embedding_log_prob=float(before.attn.log_prob[number * host.n_layers]),
            layer_scores=layer_results[number],
            head_scores=head_results[number],
            ffn_neurons=ffn_results[number],
            attn_neurons=attn_results[number],
            warnings=(
                *_warnings(host),
                *space_warnings(host, captured.prompt, captured.log_prob_of),
            ),
            seconds=0.0,
        )
        for number, captured in enumerate(captures)
    ]


def _settled(value: float, target: Target) -> float:
    """A divergence is not below 0, whatever rounds where it is 0."""
    return value if target.distribution is None else min(0.0, value)


def _target_of(host: Host, captured: Capture) -> Target:
    """What is asked about, now that the run is known: by default its own top prediction."""
    target = captured.prompt.target
    if target is None:
        token, _ = captured.top_predictions(1)[0]
        return Target(id=token, text=host.token_text(token))
    wanted = target.distribution
    if wanted is None or wanted.probs is not None:
        return target
    return of_distribution(host, replace(wanted, probs=captured.probs()))


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
