"""Whether a function is a method: checks to run your own through.

``check_method(mine)`` runs them all. ``METHOD_CHECKS`` are the checks one by one, for pytest::

    @pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
    def test_my_method_is_one(check, cases):
        check(mine, cases)

A check raises ``ConformanceError`` with a sentence that says what is wrong, and says nothing
otherwise. A method that raises ``InputError`` for a kind of neurons is not asked about it again;
but it must take one of the two kinds. After every call torch's modes, the random states and the
hooks are put back; what a method did to weights, gradients and flags stays, and is told.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from tl_neuron_attr.attribute import attribute, attribute_all
from tl_neuron_attr.errors import ConformanceError, InputError
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.index import ProjectionIndex
from tl_neuron_attr.methods.case import Case, Method, neuron_shape
from tl_neuron_attr.methods.registry import method_name
from tl_neuron_attr.models import load_model
from tl_neuron_attr.prompts import Prompt
from tl_neuron_attr.state import (
    changed,
    model_state,
    put_back,
    random_states,
    torch_modes,
    weights_digest,
)
from tl_neuron_attr.targets import tokenize
from tl_neuron_attr.topk import Kind

Check = Callable[[Method, Iterable[Case]], None]
"""``check(method, cases)``: raises ``ConformanceError`` if the method is not one."""

KINDS: tuple[Kind, ...] = ("ffn", "attn")

_TOPS = (1, 10)

# Of the largest score, how far rounding may move one: in a batch a prompt is padded, and sums
# are taken in another order.
_ROUNDING = 1e-3

# Scores in steps, like a rank, jump where two tokens all but tie: so many may.
_JUMPS = 1e-3


def example_cases(model: Any = None) -> tuple[Case, ...]:
    """Two prompts of the bundled model, of different lengths, each beside a corrupted one.

    ``model`` may be given to save loading it: tiny-facts, as ``load_model()`` gives it.
    """
    model = load_model() if model is None else model
    host = open_host(model)
    cases = []
    for text, answer, corrupted in (
        ("The capital of France is", " Paris", "The capital of Italy is"),
        ("The main language of Italy is", " Italian", "The main language of France is"),
    ):
        result = attribute(model, Prompt(text=text, target=answer), top=20)
        cases.append(Case(result=result, corrupted=tokenize(host, Prompt(text=corrupted))))
    return tuple(cases)


def check_method(method: Method, cases: Iterable[Case] | None = None) -> None:
    """Run a method through every check; it is one if nothing is raised.

    ``cases`` are by default ``example_cases()``, on the bundled model. Give at least two, of
    different prompts, of a model that is yours.

    Raises:
        ConformanceError: With what is wrong, at the first check that fails.
        InputError: If there are no cases, or among them something else.

    Cost: 28 calls of the method for each of two cases; two passes over the weights' bytes.
    """
    cases = example_cases() if cases is None else _listed(cases)
    for check in METHOD_CHECKS:
        check(method, cases)


# --- the checks -------------------------------------------------------------------------------


def check_scores(method: Method, cases: Iterable[Case]) -> None:
    """One finite number a neuron, in float32 or better, that hangs on nothing."""

    def check(case: Case, kind: Kind) -> None:
        scores = _call(method, case, kind)
        _check_form(method, case, kind, scores)
        if not scores.isfinite().all():
            bad = int((~scores.isfinite()).sum())
            _fail(
                method,
                f"gives {bad} {kind} neurons scores that are NaN or infinite; with top=None every "
                "score must be a number (0 or a low one for neurons that do nothing)",
            )

    _check_each(method, cases, check)


def check_leaves_all_alone(method: Method, cases: Iterable[Case]) -> None:
    """Weights, gradients, hooks, modes, random states and the case are what they were before."""

    def check(case: Case, kind: Kind) -> None:
        refused: InputError | None = None
        for top in (None, *_TOPS):
            try:
                _ask_and_compare(method, case, kind, top)
            except InputError as error:
                # with a top alone: ``check_best`` has a word on that
                refused = error if top is None else refused
        if refused is not None:
            raise refused

    cases = _listed(cases)
    models = list({id(case.result.host.model): case.result.host.model for case in cases}.values())
    before = [weights_digest(model) for model in models]
    _check_each(method, cases, check)
    if before != [weights_digest(model) for model in models]:
        _fail(method, "changes the weights of the model (through .data, say); work on a copy")


def check_same_every_time(method: Method, cases: Iterable[Case]) -> None:
    """The same bits again, whatever was asked in between, and under another random seed."""

    def check(case: Case, kind: Kind) -> None:
        first = _call(method, case, kind).clone()
        for other in listed:
            if other is not case:
                with suppress(InputError):
                    _call(method, other, kind)
        # of the devices in use: asked about all there are, torch warns
        used = [each for each in case.result.host.devices if each.type == "cuda"]
        with torch.random.fork_rng(used):
            torch.manual_seed(1234)
            again = _call(method, case, kind)
        if _differ(first, again):
            _fail(
                method,
                f"gives other scores of {kind} neurons when it is called a second time; scores may "
                "depend on the case, the kind and top alone",
            )

    listed = _listed(cases)
    _check_each(method, listed, check)


def check_best(method: Method, cases: Iterable[Case]) -> None:
    """With ``top`` the best so many are the best of all, with their scores; others may be -inf."""

    def check(case: Case, kind: Kind) -> None:
        every = _call(method, case, kind).flatten()
        near = _ROUNDING * float(every.abs().max())
        for top in _TOPS:
            try:
                scores = _call(method, case, kind, top)
            except InputError as error:
                _fail(method, f"raises InputError with top={top}, but not without: {error}")
            _check_form(method, case, kind, scores)
            scores = scores.flatten()
            if scores.isnan().any() or scores.isposinf().any():
                _fail(method, f"gives NaN or infinity with top={top}; others may be -inf, no more")
            k = min(top, len(scores))
            best = scores.topk(k)
            wrong = (best.values - every.topk(k).values).abs().max() > near
            if wrong or (best.values - every[best.indices]).abs().max() > near:
                _fail(
                    method,
                    f"with top={top} does not give the {top} best {kind} neurons that it gives "
                    "with top=None",
                )

    _check_each(method, cases, check)


def check_any_grad_mode(method: Method, cases: Iterable[Case]) -> None:
    """The same scores whether or not the caller records gradients."""

    def check(case: Case, kind: Kind) -> None:
        with torch.no_grad():
            without = _call(method, case, kind)
        with torch.enable_grad():
            recording = _call(method, case, kind)
        _check_form(method, case, kind, recording)
        if _differ(without, recording):
            _fail(method, "gives other scores where gradients are recorded than under no_grad")

    _check_each(method, cases, check)


def check_batch_does_not_matter(method: Method, cases: Iterable[Case]) -> None:
    """A prompt attributed beside others has the scores it has alone, to rounding."""

    def check(case: Case, kind: Kind) -> None:
        alone = _call(method, case, kind)
        beside = _call(method, _attributed_beside_others(case), kind)
        off = (alone - beside).abs() > _ROUNDING * alone.abs().max()
        if off.double().mean() > _JUMPS:
            _fail(
                method,
                f"gives {int(off.sum())} {kind} neurons another score where the prompt was "
                "attributed in a batch; look at nothing but the case",
            )

    _check_each(method, cases, check)


METHOD_CHECKS: tuple[Check, ...] = (
    check_leaves_all_alone,  # the first, for what a method changes it may change only once
    check_scores,
    check_same_every_time,
    check_best,
    check_any_grad_mode,
    check_batch_does_not_matter,
)
"""Every check, one by one: for ``pytest.mark.parametrize``."""


# --- what they rest on ------------------------------------------------------------------------


def _check_each(method: Method, cases: Iterable[Case], check: Callable[[Case, Kind], None]) -> None:
    """A check of each case with each kind that the method takes there: it must take some."""
    cases = _listed(cases)
    if not callable(method):
        raise ConformanceError(
            f"a method is a function of (case, kind, top), got {method!r}; pass the function itself"
        )
    reasons = []
    for case in cases:
        for kind in KINDS:
            try:
                check(case, kind)
            except InputError as error:
                reasons.append(str(error))
    if len(reasons) == len(cases) * len(KINDS):
        _fail(
            method,
            f"raises InputError for every case and kind ({reasons[0]}); it must take some, or be "
            "checked with cases that it can take",
        )


def _listed(cases: Any) -> tuple[Case, ...]:
    """The cases, once it is known that there are some, and nothing else among them."""
    listed = tuple(cases) if isinstance(cases, Iterable) else ()
    wrong = [each for each in listed if not isinstance(each, Case)]
    if wrong or not isinstance(cases, Iterable):
        raise InputError(
            "a method is checked with a list of cases, each a Case(result=attribute(...)); got "
            f"{(wrong or [cases])[0]!r}"
        )
    if not listed:
        raise InputError("there are no cases to check a method with; give at least one")
    return listed


def _ask_and_compare(method: Method, case: Case, kind: Kind, top: int | None) -> None:
    """Ask once, and look at what changed meanwhile, also where the method raised."""
    host = case.result.host
    before, numbers = model_state(host.model), [each.clone() for each in _tensors(case)]
    with put_back(host.model):
        modes, drawn_from = torch_modes(), random_states(host.devices)
        try:
            _ask(method, case, kind, top)
        finally:
            for what in changed(before, model_state(host.model)):
                _fail(method, f"changes {what} of the model; leave it as it was")
            if names := changed(modes, torch_modes()):
                _fail(
                    method,
                    f"changes {', '.join(names)} of torch; leave it as it was, also after an "
                    "exception",
                )
            for what in changed(drawn_from, random_states(host.devices)):
                _fail(
                    method,
                    f"draws from {what}, which are everybody's; take a generator with a seed of "
                    "your own (torch.Generator, numpy.random.default_rng)",
                )
            if any(map(_differ, numbers, _tensors(case))):
                _fail(method, "writes into the tensors of the case; clone what you change")


def _call(method: Method, case: Case, kind: Kind, top: int | None = None) -> Tensor:
    """What the method gives; modes, random states and hooks are put back."""
    with put_back(case.result.host.model):
        return _ask(method, case, kind, top)


def _ask(method: Method, case: Case, kind: Kind, top: int | None) -> Tensor:
    """What the method gives, which must be a tensor; ``InputError`` where it cannot be used."""
    try:
        scores = method(case, kind, top)
    except InputError:
        raise
    except Exception as error:  # a user's function may raise anything, and hears of it
        raise ConformanceError(
            f"{method_name(method)} raises {type(error).__name__} when called with (case, "
            f"{kind!r}, {top}): {error}; where it cannot be used it should raise InputError"
        ) from error
    if not isinstance(scores, Tensor):
        _fail(method, f"gives a {type(scores).__name__}; give a torch tensor")
    return scores


def _check_form(method: Method, case: Case, kind: Kind, scores: Tensor) -> None:
    host = case.result.host
    wanted = neuron_shape(host, kind)
    axes = "[layer, d_mlp]" if kind == "ffn" else "[layer, head, d_head]"
    if tuple(scores.shape) != wanted:
        _fail(
            method,
            f"gives {kind} neurons scores of shape {list(scores.shape)}; give {list(wanted)}, "
            f"which is {axes}",
        )
    if scores.dtype not in (torch.float32, torch.float64):
        _fail(method, f"gives scores in {scores.dtype}; give torch.float32 or torch.float64")
    device = case.result.captured.mlp_post.device
    if scores.device != device:
        _fail(method, f"gives scores on {scores.device}; give them where the case is, on {device}")
    if scores.requires_grad:
        _fail(method, "gives scores that require gradients; detach them, or work under no_grad")
    own = {tensor.untyped_storage().data_ptr() for tensor in _tensors(case)}
    own |= {weight.untyped_storage().data_ptr() for weight in _weights(host)}
    if scores.untyped_storage().data_ptr() in own:
        _fail(method, "gives a tensor of the case or of the model itself; clone it")


def _fail(method: Method, what: str) -> NoReturn:
    raise ConformanceError(f"{method_name(method)} {what}")


def _attributed_beside_others(case: Case) -> Case:
    """The case with its prompt attributed in a batch with two others, one longer, one shorter."""
    result = case.result
    prompt = result.captured.prompt
    asked = Prompt(
        tokens=prompt.tokens,
        target=result.target.as_asked,
        against=None if result.target.against is None else result.target.against.id,
        position=prompt.read_pos,
        prompt_id=prompt.prompt_id,
    )
    others = [prompt.tokens[:1], (*prompt.tokens, prompt.tokens[-1])]
    fitting = [tokens for tokens in others if len(tokens) <= result.host.n_ctx]
    prompts = [
        *(replace(asked, tokens=tokens, position=-1, prompt_id=None) for tokens in fitting),
        asked,
    ]
    found = attribute_all(
        result.host.model,
        prompts,
        top=len(result.ffn_neurons),
        convention=result.convention,
        dtype=result.out.dtype,
        budget=result.out.budget,
    )
    return replace(case, result=found[-1])


def _tensors(case: Case) -> list[Tensor]:
    """All numbers of the case: the capture's and the result's. Weights have a digest."""
    host = case.result.host
    weights = {each.untyped_storage().data_ptr() for each in _weights(host)}
    found = list(_tensors_in(case.result))
    return [each for each in found if each.untyped_storage().data_ptr() not in weights]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _tensors_in(each)
    # an index is as large as the model, and of it, not of the case
    elif is_dataclass(value) and not isinstance(value, (Host, ProjectionIndex)):
        for field in fields(value):
            yield from _tensors_in(getattr(value, field.name))


def _weights(host: Host) -> list[Tensor]:
    return [*host.model.parameters(), *host.model.buffers()]


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or not torch.equal(one, other)
