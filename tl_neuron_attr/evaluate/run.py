"""START HERE: model + prompts + methods -> Evaluation, the paper's test in one screen.

known    = known_prompts(model, prompts)   which answers the model knows    (knowledge/known.py)
results  = attribute_all(model, some)      what raised them                 (attribute.py)
found    = ranked(case, methods, ...)      what each method would zero      (effects.py)
runs     = conditions(found, ...)          that, and the controls beside    (rankings.py)
measured = effects(cases, runs)            what becomes of the answer       (effects.py)
parts    = rows_of(...)                    as rows, batch by batch          (assemble.py)
Evaluation(...).summary()                  what it comes to, and how sure   (evaluation.py)
"""

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

from tl_neuron_attr.attribute import attribute_all
from tl_neuron_attr.attribution import Attribution, progress_bar
from tl_neuron_attr.evaluate.assemble import (
    Rows,
    evaluation_of,
    origin_of,
    rows_of,
)
from tl_neuron_attr.evaluate.effects import conditions, effects, ranked
from tl_neuron_attr.evaluate.evaluation import Evaluation
from tl_neuron_attr.evaluate.request import Request
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.knowledge import (
    AskedPrompt,
    KnowledgePrompt,
    KnownPrompts,
    corrupted_of,
    known_prompts,
    load_prompts,
)
from tl_neuron_attr.knowledge.known import drawn_evenly
from tl_neuron_attr.methods import Case, Method
from tl_neuron_attr.prompts import TokenizedPrompt
from tl_neuron_attr.readout import DEFAULT_BUDGET, check_read_out

DEFAULT_METHODS = ("log_prob_increase",)
DEFAULT_TOP = 10


def evaluate(
    model: Any,
    prompts: str | os.PathLike[str] | KnownPrompts | Iterable[KnowledgePrompt],
    methods: str | Method | Iterable[str | Method] = DEFAULT_METHODS,
    *,
    neurons: str | Iterable[str] = "ffn",
    top: SupportsIndex | Iterable[SupportsIndex] = DEFAULT_TOP,
    limit: SupportsIndex | None = None,
    seed: SupportsIndex = 0,
    filtered: bool = True,
    correlate: bool = False,
    prepend_bos: bool | None = None,
    budget: SupportsIndex = DEFAULT_BUDGET,
    batch_size: SupportsIndex = 32,
    progress: bool = False,
) -> Evaluation:
    """What becomes of the answers when each method's best neurons are zeroed, beside controls.

    For each prompt by itself each method ranks the neurons for the prompt's own answer; its
    ``top`` best are zeroed together, at all positions, and the model run again. Beside them stand
    two controls of as many other neurons, layer by layer, as the *first* method chose, none of
    which it did: ``random`` ones, and ``norm_matched`` ones, whose contributions at the read
    position are in norm (absolute coefficient times norm of the subvalue) next to those chosen.

    Args:
        model: A ``TransformerBridge`` or a ``HookedTransformer``; it is left as it was.
        prompts: A knowledge type, ``"all"``, ``"paper"``, a file (see ``load_prompts``), prompts,
            or what ``known_prompts`` gave.
        methods: One or several: names of ``METHODS`` or the paper's letters ``a`` to ``h`` (also in
            one text, ``"a,b,norm"``), or functions of your own, called by their name. The controls
            stand beside the first.
        neurons: ``"ffn"``, ``"attn"`` (layer, head, index: all source positions), or ``"both"``:
            so many best ones of each kind, zeroed together; or several of these.
        top: How many neurons; several for a curve.
        limit: At most so many prompts, drawn evenly from the knowledge types among those kept:
            a smaller limit draws some of the same. None for all.
        seed: Of what is drawn: prompts, controls, resamples. A prompt's controls depend on this
            and its ``prompt_id`` alone.
        filtered: Keep only prompts whose answer the model knows (see ``known_prompts``). If False,
            all whose answer is one token.
        correlate: Also the rank correlation of each method's scores, over all neurons, with exact
            ablation of every neuron in turn: as many forward passes a prompt as there are neurons.
        prepend_bos: Whether texts get a BOS token; by default what TransformerLens does.
        budget: Bytes for the working set of read-outs.
        batch_size: Prompts at a time; it changes speed and memory, no result beyond rounding.
        progress: Show a progress bar, with the time left.

    A method that cannot be used on a prompt (no corrupted prompt for attribution patching, say) is
    left out there, which ``Evaluation.skipped`` says, with its reason; one that can be used on none
    is left out of the tables, with a warning.

    Raises:
        InputError: For anything wrong with the request, before the first forward pass; if no prompt
            remains; if the first method is applicable to none; if one does not give scores.
        UnsupportedModelError, IdentityError, NonFiniteError: As in ``attribute``.

    Cost: for each prompt one attribution, each method's own cost, and one row of a forward pass for
    each method, control, kind and number of neurons.
    Peak memory: captures and scores of ``batch_size`` prompts.

    Source: Yu & Ananiadou (2024), section 4: N = 10 FFN neurons.
    """
    request = Request.of(
        methods=methods,
        neurons=neurons,
        top=top,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        budget=budget,
        correlate=correlate,
    )
    host = open_host(model)
    check_read_out(host, "recomputed", request.budget)
    request.check_fits(host)
    known, messages = _known(host, prompts, filtered, prepend_bos, progress)
    asked = drawn_evenly(known.kept, request.limit, request.seed)
    parts: list[Rows] = []
    origin: dict[str, Any] = {}
    with progress_bar(len(asked), "prompt", progress) as bar:
        for first in range(0, len(asked), request.batch_size):
            some = asked[first : first + request.batch_size]
            results = _attributed(host, some, request)
            origin = origin or origin_of(results[0])
            parts += _measured(request, some, results, corrupted_in(known.kept, some, request.seed))
            bar.update(len(some))
    found = evaluation_of(request, known, asked, parts, origin, messages)
    for message in found.facts["warnings"][len(known.warnings) :]:
        warnings.warn(message, stacklevel=2)
    return found


def corrupted_in(
    kept: Sequence[AskedPrompt], some: Sequence[AskedPrompt], seed: int
) -> list[TokenizedPrompt | None]:
    """For each of ``some`` the same question about something else, where ``kept`` has one."""
    of_wording: dict[tuple[str, str], list[AskedPrompt]] = {_wording(each): [] for each in some}
    for each in kept:
        if _wording(each) in of_wording:
            of_wording[_wording(each)].append(each)
    return [corrupted_of(each, of_wording[_wording(each)], seed=seed) for each in some]


def _wording(asked: AskedPrompt) -> tuple[str, str]:
    return asked.prompt.fact.relation, asked.prompt.phrasing


def _known(
    host: Host, prompts: Any, filtered: bool, prepend_bos: bool | None, progress: bool
) -> tuple[KnownPrompts, list[str]]:
    """What the model knows, and what reading the prompts had to say."""
    if isinstance(prompts, KnownPrompts):
        return prompts, []
    messages: list[str] = []
    if isinstance(prompts, (str, os.PathLike)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            prompts = load_prompts(prompts)
        messages = [str(warning.message) for warning in caught]
    limits: dict[str, Any] = {} if filtered else {"top": None, "above_type": False}
    known = known_prompts(host, prompts, prepend_bos=prepend_bos, progress=progress, **limits)
    return known, messages


def _attributed(host: Host, asked: Sequence[AskedPrompt], request: Request) -> list[Attribution]:
    """One result a prompt, each about its own answer."""
    questions = [each.as_prompt() for each in asked]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the same for every batch; in ``facts``
        return attribute_all(
            host.model,
            questions,
            top=max(request.tops),
            budget=request.budget,
            batch_size=request.batch_size,
        )


def _measured(
    request: Request,
    asked: Sequence[AskedPrompt],
    results: Sequence[Attribution],
    corrupted: Sequence[TokenizedPrompt | None],
) -> list[Rows]:
    """Rank, zero and measure; nothing but rows is left of what it took."""
    found = [
        ranked(
            Case(result=result, corrupted=other),
            request.methods,
            request.kinds,
            max(request.tops),
            every=request.correlate,
        )
        for result, other in zip(results, corrupted, strict=True)
    ]
    zeroed = [
        conditions(each, request.which, request.tops, request.reference, request.seed)
        for each in found
    ]
    measured = effects([each.case for each in found], zeroed, budget=request.budget)
    return [
        rows_of(request, each, one, before, after)
        for each, one, (before, after) in zip(asked, found, measured, strict=True)
    ]
