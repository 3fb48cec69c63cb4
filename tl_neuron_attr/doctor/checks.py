"""What is looked at: the checks one by one, each a function of an examined model.

A check measures the same in the model as it was given and in its copy in float64, where rounding
is 1e9 times smaller: a difference that keeps its size there is no rounding. What a check raises is
turned into a finding by ``check.py``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.attribute import attribute_all
from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.capture import capture_all
from tl_neuron_attr.decompose import Decomposition
from tl_neuron_attr.display import counted
from tl_neuron_attr.doctor.findings import Finding, Measured, finding_of, worst
from tl_neuron_attr.doctor.subject import (
    TOP,
    Examined,
    Subject,
    as_asked,
    ranked,
    why_no_sentence,
)
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.hook_points import has_hooks
from tl_neuron_attr.host import Host
from tl_neuron_attr.identities import Identity, identities, subkey_identities
from tl_neuron_attr.interventions import Zeroed, capture_zeroed
from tl_neuron_attr.neurons import AttnNeuron
from tl_neuron_attr.precision import is_full_precision
from tl_neuron_attr.prompts import Prompt, Target
from tl_neuron_attr.readout import CONVENTIONS, Convention, ReadOut, read_out
from tl_neuron_attr.state import changed, model_state, random_states, torch_modes
from tl_neuron_attr.targets import tokenize
from tl_neuron_attr.topk import RankedNeurons, score_bounds

HostCheck = Callable[[Examined], tuple[Finding, ...]]
"""``check(examined)``: what it found, one finding or several."""

# Of the largest score or the largest part, by the dtype the model runs in: what another order of
# sums may change. In float64 that is 1e-8 (1e4 times less than in float32), but some of Hugging
# Face's modules compute in float32 even there: RMSNorm, and what two runs of GPT-Neo attend to.
_RUNS = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
_IN_FLOAT32 = 1e-6

# Of the largest score, in the dtype of scores: what another block of a read-out may change.
_RANKED = {torch.float64: 1e-10, torch.float32: 1e-5}

_HALF = (torch.float16, torch.bfloat16)


def check_weights(examined: Examined) -> tuple[Finding, ...]:
    """Whether the weights are as they were trained, and no hooks of the user's edit runs."""
    host = examined.own.host
    if host.value_biases_folded:
        weights = Finding(
            name="the weights",
            status="approximate",
            says=f"{host.processing}: attention neurons and heads lack what the value biases "
            "brought, so their scores differ from those of the raw weights; load them raw",
        )
    else:
        says = "raw, as they were trained" if host.processing == "raw" else host.processing
        weights = Finding(name="the weights", status="ok", says=says)
    if not has_hooks(host.model):
        return (weights,)
    hooks = Finding(
        name="hooks on the model",
        status="approximate",
        says="there are hooks of yours, which may edit: all that follows is of the model with them",
    )
    return weights, hooks


def check_precision(examined: Examined) -> tuple[Finding, ...]:
    """How far the forward pass's own rounding moves the prediction."""
    own, double = examined.own, examined.double
    dtype = str(own.host.dtype).removeprefix("torch.")
    half = own.host.dtype in _HALF
    if double is None:
        return (
            Finding(
                name="the forward pass",
                status="approximate" if half else "not checked",
                says=f"how far {dtype} moves the prediction is not known: {examined.why_no_double}"
                if own.host.dtype != torch.float64
                else "in float64, beside nothing wider",
            ),
        )
    target = int(double.captured.logits.argmax())
    error = abs(
        own.captured.to(torch.float64).log_prob_of(target) - double.captured.log_prob_of(target)
    )
    # float32 moves it by about 1e-6 nats; half precision by what it does, which is said
    allowed = 1e-3
    if half:
        status = "approximate"
    else:
        status = "ok" if error <= allowed else "fails"
    return (
        Finding(
            name="the forward pass",
            status=status,
            says=f"log p of its first token in {dtype} less that in float64, nats"
            + (", which scores inherit" if half else ""),
            error=error,
            tolerance=None if half else allowed,
        ),
    )


def check_left_alone(examined: Examined) -> tuple[Finding, ...]:
    """Weights, hooks, flags, modes and random states are the same after an attribution."""
    host = examined.own.host
    states = model_state(host.model), torch_modes(), random_states([host.device])
    ranked(host.model, as_asked(examined.own.prompt))
    after = model_state(host.model), torch_modes(), random_states([host.device])
    names = [name for was, now in zip(states, after, strict=True) for name in changed(was, now)]
    afterwards = Finding(
        name="the model afterwards",
        status="fails" if names else "ok",
        says=f"an attribution changes {', '.join(names)}"
        if names
        else "weights, hooks, flags, modes and random states as before",
    )
    if is_full_precision():
        return (afterwards,)
    reduced = Finding(
        name="the precision you set",
        status="not checked",
        says="autocast or a lower precision of float32 products is set aside here, as in every "
        "attribution: what the model predicts under it was not looked at",
    )
    return afterwards, reduced


def check_identities(examined: Examined) -> tuple[Finding, ...]:
    """Neurons add up to what their block wrote, and the read-out is the model's."""
    return _in_both(
        examined,
        lambda subject: _measured(subject.host, identities(subject.host, subject.captured)),
    )


def check_subkeys(examined: Examined) -> tuple[Finding, ...]:
    """Pre-activations recomputed from the stream are the model's: query scores rest on it."""
    return _in_both(
        examined,
        lambda subject: _measured(subject.host, subkey_identities(subject.host, subject.captured)),
    )


def check_prediction(examined: Examined) -> tuple[Finding, ...]:
    """What is explained is what the model says when it is just called."""

    def measure(subject: Subject) -> list[Measured]:
        tokens = torch.tensor([subject.prompt.tokens], device=subject.host.device)
        with torch.no_grad():
            called = subject.host.model(tokens)
        logits = getattr(called, "logits", called)[0, subject.prompt.read_pos]
        said = replace(subject.captured, logits=logits.to(subject.captured.logits))
        theirs = said.log_prob_of(subject.attributed.target.id)
        # of the size a log p may have: one that is nearly 0 would make any rounding look large
        size = max(1.0, abs(theirs))
        # large logits in half precision are further apart than that
        apart = torch.finfo(logits.dtype).eps * float(logits.abs().max())
        return [
            Measured(
                name="log p of the answer",
                equation="log p attributed = log p that model(tokens) gives",
                error=abs(subject.attributed.log_prob - theirs) / size,
                tolerance=max(_allowed(subject.host), apart / size),
            )
        ]

    return _in_both(examined, measure)


def check_layers(examined: Examined) -> tuple[Finding, ...]:
    """The rises of all layers add up to the whole rise, where blocks are sequential."""
    if examined.own.host.parallel:
        return (
            Finding(
                name="the sum of the layers",
                status="not checked",
                says="parallel blocks: attention and FFN read the same stream, so rises do not "
                "add up, and no sum of them means anything",
            ),
        )

    def measure(subject: Subject) -> list[Measured]:
        found = subject.attributed
        rises = torch.cat([found.layer_scores.attn, found.layer_scores.ffn])
        whole = found.log_prob - found.embedding_log_prob
        size = max(1.0, float(rises.abs().max()), abs(found.embedding_log_prob))
        return [
            Measured(
                name="the sum of the layers",
                equation="sum of rises = log p(end) - log p(embedding)",
                error=abs(float(rises.sum()) - whole) / size,
                tolerance=_RUNS[subject.host.dtype],
            )
        ]

    return _in_both(examined, measure)


def check_bounds(examined: Examined) -> tuple[Finding, ...]:
    """No neuron scores above its bound, and the best are those that scoring more of them finds."""

    def measure(subject: Subject) -> list[Measured]:
        found = subject.attributed
        kinds = (
            ("FFN", found.ffns, found.ffn_neurons),
            ("attention", found.attns, found.attn_neurons),
        )
        outs = {name: out for name, out in _read_outs(subject).items() if out.bounded}
        measured = []
        for name, blocks, best_of in kinds:
            excess, where = -math.inf, ""
            for block, (convention, out) in product(blocks, outs.items()):
                _, scores, bounds = _scored_and_bounded(block, out, found.target)
                over = float((scores - bounds).max()) if len(scores) else -math.inf
                if over > excess:
                    excess, where = over, f"layer {block.layer}, {convention}"
            best = _best_unlisted(blocks, best_of, found)
            size = max(1e-6, float(best_of.score.abs().max()))
            measured += [
                Measured(
                    name=f"bounds on {name} scores",
                    equation="score <= bound, nats",
                    error=max(0.0, excess),
                    tolerance=0.0,
                    where=where,
                    seen=excess > -math.inf,
                ),
                Measured(
                    name=f"the best {name} neurons",
                    equation="none looked at scores above the last listed, nats",
                    error=max(0.0, best - float(best_of.score[-1])),
                    tolerance=_RANKED[found.out.dtype] * size,
                    seen=best > -math.inf,
                ),
            ]
        return measured

    lines = _in_both(examined, measure)
    return (*lines, _certified(examined.own, lines))


def _certified(subject: Subject, lines: Sequence[Finding]) -> Finding:
    """Where bounds apply, as far as the lines of what was measured of them allow to say so."""
    outs, capped = _read_outs(subject), subject.host.soft_cap is not None
    bounded = " and ".join(name for name, out in outs.items() if out.bounded)
    dense = ", ".join(name for name, out in outs.items() if not out.bounded)
    measured = [each for each in lines if each.name.startswith("bounds on ")]
    status = worst(measured)
    if status == "fails":
        wrong = ", ".join(each.name for each in measured if each.status == "fails")
        says = f"do not hold ({wrong}): no list of neurons is proven to be of the best"
    elif status == "not checked":
        seen = " and ".join(each.name for each in measured if each.status == "ok")
        says = f"only {seen} were looked at" if seen else "none was looked at"
    elif capped:
        status = "approximate"
        says = (
            f"apply in {bounded}, to the best neurons alone: through the soft cap on logits the "
            "lowest, and differences of runs, take scoring every neuron, and there are no intervals"
        )
    else:
        says = (
            f"apply in {bounded}; a contrast is linear and needs none; {dense} has none, so "
            "every neuron is scored"
        )
    return Finding(name="certified bounds", status=status, says=says)


def check_query_scores(examined: Examined) -> tuple[Finding, ...]:
    """What earlier components bring sums to the scores of the value neurons they feed."""

    def measure(subject: Subject) -> list[Measured]:
        scores = subject.attributed.query_scores("both", top_values=TOP)
        brought = float(scores.embed + scores.bias + scores.attn.sum() + scores.ffn.sum())
        every = torch.cat([each.score for each in scores.values])
        handed = float(every[~scores.left_out].sum())
        # shares may be large and cancel, up to the limit at which they are left out
        size = max(1e-6, float(every.abs().sum()))
        return [
            Measured(
                name="the sum of query scores",
                equation="embedding + layers + biases = value neurons' scores",
                error=abs(brought - handed) / size,
                # through what the norm in front gave, which Hugging Face takes in float32
                tolerance=_allowed(subject.host),
            )
        ]

    return _in_both(examined, measure)


def check_zeroing(examined: Examined) -> tuple[Finding, ...]:
    """What is zeroed is gone from the run: its block writes what the others add up to."""

    def measure(subject: Subject) -> list[Measured]:
        best = subject.attributed
        attn = best.attn_neurons.neurons()[0]
        assert isinstance(attn, AttnNeuron)
        parts = {
            "zeroing an FFN neuron": best.ffn_neurons.neurons()[0],
            "zeroing an attention neuron": replace(attn, source_pos=None),
            "zeroing it from one position": attn,
        }
        prompts = [subject.prompt] * len(parts)
        scores = (best.ffn_neurons.score[0], best.attn_neurons.score[0], best.attn_neurons.score[0])
        runs = capture_zeroed(subject.host, prompts, [Zeroed((part,)) for part in parts.values()])
        measured = []
        for name, score, run in zip(parts, scores, runs, strict=True):
            found = _measured(subject.host, identities(subject.host, run))
            wrong = max(found, key=lambda each: each.error / each.tolerance)
            still = torch.equal(run.resid_final, subject.captured.resid_final)
            measured.append(
                Measured(
                    name=name,
                    equation="all identities hold of the run without it",
                    # a neuron that is on, and zeroed, moves the end of the stream
                    error=math.nan if still else wrong.error,
                    tolerance=wrong.tolerance,
                    where="the end, which does not move" if still else wrong.name,
                    seen=not still or bool(score != 0),
                )
            )
        return measured

    return _in_both(examined, measure)


def check_batches(examined: Examined) -> tuple[Finding, ...]:
    """A prompt beside a longer and a shorter one has the scores it has alone."""

    def measure(subject: Subject) -> list[Measured]:
        tokens, model = subject.prompt.tokens, subject.host.model
        others = [tokens[:1], (*tokens, tokens[-1])]
        fitting = [each for each in others if len(each) <= subject.host.n_ctx]
        prompts = [as_asked(subject.prompt, each) for each in fitting]
        found = attribute_all(model, [*prompts, _with_target(subject)], top=TOP)[-1]
        return [_difference("in a batch", subject, found)]

    return _in_both(examined, measure)


def check_left_padding(examined: Examined) -> tuple[Finding, ...]:
    """A prompt padded on the left is run as it is alone."""

    tokens, host, captured = examined.own.prompt.tokens, examined.own.host, examined.own.captured
    if len(tokens) >= host.n_ctx:
        raise InputError("the prompt fills the context, so there is no room for padding")
    longer = tokenize(host, Prompt(tokens=(*tokens, tokens[-1])))
    _, padded = capture_all(host, [longer, examined.own.prompt], padding_side="left")
    error = (padded.resid_final - captured.resid_final).abs().max()
    # nothing differs from nothing by nothing
    size = captured.resid_final.abs().max().clamp(min=torch.finfo(error.dtype).tiny)
    measured = Measured(
        name="padded on the left",
        equation="the stream at the end = that without padding",
        error=float(error / size),
        tolerance=max(_RUNS[host.dtype], _IN_FLOAT32),
    )
    return (finding_of(measured, None),)


def check_cache(examined: Examined) -> tuple[Finding, ...]:
    """An ActivationCache of the model's own gives what a run of ours gives."""
    subject = examined.own
    tokens = torch.tensor([subject.prompt.tokens], device=subject.host.device)
    with torch.no_grad():
        _, cache = subject.host.model.run_with_cache(tokens)
    found = ranked(subject.host.model, _with_target(subject), cache=cache)
    return (finding_of(_difference("from run_with_cache", subject, found), None),)


def check_again(examined: Examined) -> tuple[Finding, ...]:
    """A second run gives the same."""
    subject = examined.own
    found = ranked(subject.host.model, _with_target(subject))
    return (finding_of(_difference("a second time", subject, found), None),)


def check_text(examined: Examined) -> tuple[Finding, ...]:
    """Whether the model can be asked by text."""
    host, prompt = examined.own.host, examined.own.prompt
    tokenizer = getattr(host.model, "tokenizer", None)
    if tokenizer is None:
        finding = Finding(
            name="prompts as text",
            status="refused",
            says="the model has no tokenizer: ask by token ids",
        )
    elif prompt.text is None:
        why = why_no_sentence(host)
        finding = Finding(
            name="prompts as text",
            status="refused" if why else "not checked",
            says=f"{why}; it was asked by token ids" if why else "it was asked by token ids",
        )
    else:
        read = "".join(prompt.token_texts)
        same = prompt.text in read
        finding = Finding(
            name="prompts as text",
            status="ok" if same else "approximate",
            says="the tokens read as the text does"
            if same
            else f"the tokens read {read!r}, not {prompt.text!r}",
        )
    return (finding,)


def check_limits(examined: Examined) -> tuple[Finding, ...]:
    """What nobody looked at."""
    host, length = examined.own.host, len(examined.own.prompt.tokens)
    return (
        Finding(
            name="other prompts",
            status="not checked",
            says=f"all of this is of one prompt of {counted(length, 'token')}, read at position "
            f"{examined.own.prompt.read_pos}; the context is {host.n_ctx:,}, and windows of "
            "attention or scaled positions act on longer ones: check again with one of yours",
        ),
        Finding(
            name="the projection index",
            status="not checked",
            says="it reads every weight: tl-neuron-attr index makes it, and intervals check it",
        ),
    )


def check_router(examined: Examined) -> tuple[Finding, ...]:
    """What is left out where a router chooses experts."""
    host = examined.own.host
    if not host.n_experts:
        return ()
    return (
        Finding(
            name="the router",
            status="approximate",
            says="what it chose and how it weighs that is exact in coefficients and scores; query "
            "scores and cards take it as given: what sets a neuron off is what feeds its gate and "
            "up pre-activations, not what brought its expert the position",
        ),
    )


HOST_CHECKS: tuple[HostCheck, ...] = (
    check_left_alone,  # the first, for what is changed may change only once
    check_identities,
    check_subkeys,
    check_prediction,
    check_layers,
    check_bounds,
    check_query_scores,
    check_zeroing,
    check_batches,
    check_left_padding,
    check_router,
    check_cache,
    check_again,
    check_weights,
    check_precision,
    check_text,
    check_limits,
)
"""Every check, one by one: for ``pytest.mark.parametrize`` and ``check_host``."""


# --- what they rest on ------------------------------------------------------------------------


def _in_both(
    examined: Examined, measure: Callable[[Subject], Sequence[Measured]]
) -> tuple[Finding, ...]:
    """What is measured in the model and, if there is one, in its copy."""
    own = measure(examined.own)
    double = [None] * len(own) if examined.double is None else measure(examined.double)
    return tuple(finding_of(*pair) for pair in zip(own, double, strict=True))


def _allowed(host: Host) -> float:
    """The largest error of what passes through the model's norms."""
    if host.dtype == torch.float64 and host.norm == "rms_norm":
        return _IN_FLOAT32
    return _RUNS[host.dtype]


def _measured(host: Host, found: Sequence[Identity]) -> list[Measured]:
    return [
        Measured(
            name=identity.name,
            equation=identity.equation,
            error=identity.error,
            tolerance=_tolerance(host, identity),
            where="" if identity.layer is None else f"layer {identity.layer}",
        )
        for identity in found
    ]


def _tolerance(host: Host, identity: Identity) -> float:
    """What the identity allows, and in float64 less where all of the model computes in it."""
    if host.dtype == torch.float64:
        return min(identity.tolerance, _allowed(host))
    return identity.tolerance


def _with_target(subject: Subject) -> Prompt:
    """The same question about the same answer, whatever rounding does to the prediction."""
    prompt = subject.prompt
    target = subject.attributed.target.id
    return Prompt(tokens=prompt.tokens, position=prompt.read_pos, target=target)


def _difference(name: str, subject: Subject, other: Attribution) -> Measured:
    """The largest difference of any layer's, head's or listed neuron's score."""
    error = 0.0
    for wanted, given in zip(_scores(subject.attributed), _scores(other), strict=True):
        size = max(1e-6, float(wanted.abs().max()))
        error = max(error, float((wanted - given).abs().max()) / size)
    return Measured(
        name=name,
        equation="scores = those of the prompt alone",
        error=error,
        tolerance=max(_RUNS[subject.host.dtype], _IN_FLOAT32),
    )


def _scores(found: Attribution) -> list[Float[Tensor, " score"]]:
    return [
        found.layer_scores.attn,
        found.layer_scores.ffn,
        found.head_scores.flatten(),
        # ranked: neurons that all but tie may swap places, their scores do not
        found.ffn_neurons.score,
        found.attn_neurons.score,
    ]


def _read_outs(subject: Subject) -> dict[Convention, ReadOut]:
    return {
        name: read_out(subject.host, subject.captured.resid_final, name) for name in CONVENTIONS
    }


def _scored_and_bounded(
    block: Decomposition, out: ReadOut, target: Target
) -> tuple[Int[Tensor, " few"], Float[Tensor, " few"], Float[Tensor, " few"]]:
    """Some neurons of a block that are on, what they score, and what bounds it."""
    before = out.baseline(block.base[None], target)
    bounds, _ = score_bounds([block], out, before)
    few = _spread(block.n_neurons, bounds)
    few = few[block.coefficients_of(few) != 0]  # the others score 0, by definition
    if not len(few):
        return few, bounds[few], bounds[few]
    return few, out.increase(before, torch.zeros_like(few), block.vectors(few)), bounds[few]


def _best_unlisted(
    blocks: Sequence[Decomposition], listed: RankedNeurons, found: Attribution
) -> float:
    """The highest score of those looked at that are not listed."""
    numbers = set(zip(listed.layer.tolist(), listed.number.tolist(), strict=True))
    best = -math.inf
    for block in blocks:
        few, scores, _ = _scored_and_bounded(block, found.out, found.target)
        others = zip(few.tolist(), scores.tolist(), strict=True)
        best = max([best, *(each for at, each in others if (block.layer, at) not in numbers)])
    return best


def _spread(n_neurons: int, bounds: Float[Tensor, " neuron"]) -> Tensor:
    """Some neurons of a block: those of the largest bounds, and some spread over all."""
    best = bounds.topk(min(TOP, n_neurons)).indices
    step = max(1, n_neurons // TOP)
    return torch.cat([best, torch.arange(0, n_neurons, step, device=best.device)]).unique()
