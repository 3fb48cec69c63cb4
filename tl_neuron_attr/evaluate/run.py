"""START HERE: model + prompts + methods -> Evaluation, the paper's test in one screen.

known    = known_prompts(model, prompts)     which answers the model knows   (knowledge/known.py)
results  = attribute_all(model, some)        what raised them                (attribute.py)
found    = ranked(case, methods, ...)        what each method would zero     (effects.py, rankings.py)
runs     = conditions(found, ...)            that, and the controls          (effects.py, rankings.py)
measured = effects(cases, runs)              what becomes of the answer      (effects.py)
Evaluation(...).summary()                    how sure                        (evaluation.py, statistics.py)
"""

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, SupportsIndex, get_args

import numpy as np
import pandas as pd

from tl_neuron_attr.attribute import attribute_all
from tl_neuron_attr.attribution import Attribution, progress_bar
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.evaluate.effects import (
    CONTROLS,
    KINDS_OF,
    Effect,
    Ranked,
    Which,
    conditions,
    effects,
    ranked,
)
from tl_neuron_attr.evaluate.evaluation import (
    CORRELATION_COLUMNS,
    EFFECT_COLUMNS,
    METRICS,
    PREDICTED_COLUMNS,
    PROMPT_COLUMNS,
    SKIPPED_COLUMNS,
    Evaluation,
)
from tl_neuron_attr.evaluate.statistics import spearman
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.knowledge import (
    AskedPrompt,
    KnowledgePrompt,
    KnownPrompts,
    corrupted_of,
    known_prompts,
    load_prompts,
)
from tl_neuron_attr.methods import METHODS, Case, Method, method_name, method_of
from tl_neuron_attr.prompts import Prompt, at_least_one, integer
from tl_neuron_attr.readout import DEFAULT_BUDGET
from tl_neuron_attr.topk import Kind

DEFAULT_METHODS = ("log_prob_increase",)
DEFAULT_TOP = 10

EXACT = "ablation"
"""The method that others are correlated with."""

IN_NATS = frozenset(
    {"log_prob_increase", "gradient_activation", "integrated_gradients", "ablation"}
)
"""Methods whose scores say by how many nats log p(answer) falls without the neuron."""


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
        methods: One or several: names of ``METHODS``, the paper's letters ``a`` to ``h``, or
            functions of your own, called by their name. The controls stand beside the first.
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
    left out there, which ``Evaluation.skipped`` says, with its reason.

    Raises:
        InputError: For anything wrong with the request, before the first forward pass; if no prompt
            remains; if a method is applicable to none, or does not give scores.
        UnsupportedModelError, IdentityError, NonFiniteError: As in ``attribute``.

    Cost: for each prompt one attribution, each method's own cost, and one row of a forward pass for
    each method, control, kind and number of neurons.
    Peak memory: captures and scores of ``batch_size`` prompts.

    Source: Yu & Ananiadou (2024), section 4: N = 10 FFN neurons.
    """
    request = _Request.of(methods, neurons, top, limit, seed, batch_size, budget, correlate)
    host = open_host(model)
    known = _known(host, prompts, filtered, prepend_bos, progress)
    asked = drawn_evenly(known.kept, request.limit, request.seed)
    found = _Found(request=request)
    with progress_bar(len(asked), "prompt", progress) as bar:
        for first in range(0, len(asked), request.batch_size):
            some = asked[first : first + request.batch_size]
            found.add(host, some, _corrupted(some, known.kept, request.seed))
            bar.update(len(some))
    return found.evaluation(known, asked, filtered)


def drawn_evenly(
    asked: Sequence[AskedPrompt], limit: int | None, seed: int
) -> tuple[AskedPrompt, ...]:
    """At most ``limit`` of them, the knowledge types in turn, in the order they came in.

    What is drawn depends on ids and ``seed``: a smaller limit, or fewer prompts to draw from, give
    some of the same.
    """
    if limit is None or limit >= len(asked):
        return tuple(asked)

    def draw(each: AskedPrompt) -> bytes:
        return hashlib.sha256(f"{seed}\0{each.prompt.prompt_id}".encode()).digest()

    of_type: dict[str, list[AskedPrompt]] = {}
    for each in sorted(asked, key=draw):
        of_type.setdefault(each.prompt.fact.knowledge_type, []).append(each)
    types = [of_type[name] for name in sorted(of_type)]
    in_turn = [each for turn in zip_longest(*types) for each in turn if each is not None]
    taken = {each.prompt.prompt_id for each in in_turn[:limit]}
    return tuple(each for each in asked if each.prompt.prompt_id in taken)


# --- what is asked ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Request:
    methods: Mapping[str, Method]
    which: tuple[Which, ...]
    tops: tuple[int, ...]
    limit: int | None
    seed: int
    batch_size: int
    budget: int
    correlate: bool

    @property
    def reference(self) -> str:
        """The method that controls stand beside."""
        return next(iter(self.methods))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of which neurons scores are needed."""
        return tuple(
            kind for kind in get_args(Kind) if any(kind in KINDS_OF[which] for which in self.which)
        )

    @classmethod
    def of(
        cls,
        methods: Any,
        neurons: Any,
        top: Any,
        limit: Any,
        seed: Any,
        batch_size: Any,
        budget: Any,
        correlate: bool,
    ) -> "_Request":
        return cls(
            methods=chosen_methods(methods),
            which=_chosen_kinds(neurons),
            tops=_chosen_tops(top),
            limit=None if limit is None else at_least_one(limit, "limit"),
            seed=integer(seed, "seed"),
            batch_size=at_least_one(batch_size, "batch_size"),
            budget=at_least_one(budget, "budget"),
            correlate=bool(correlate),
        )


def chosen_methods(methods: Any) -> dict[str, Method]:
    """Methods by the names they have in tables, in the order given.

    Raises:
        InputError: If one is unknown, called like a control, or two have one name.
    """
    given = [methods] if isinstance(methods, str) or callable(methods) else list(methods)
    if not given:
        raise InputError(f"give at least one method: {', '.join(METHODS)}, or a function")
    found: dict[str, Method] = {}
    for each in given:
        name = method_name(each)
        if name in CONTROLS:
            raise InputError(f"{name!r} is the name of a control, which is always there")
        if name in found:
            raise InputError(f"two methods are called {name!r}; give each once, under its own name")
        found[name] = method_of(each)
    return found


def _chosen_kinds(neurons: Any) -> tuple[Which, ...]:
    given = [neurons] if isinstance(neurons, str) else list(neurons)
    if not given or any(each not in KINDS_OF for each in given) or len(set(given)) < len(given):
        raise InputError(
            f"neurons must be ffn, attn or both, or several of these, each once; got {neurons!r}"
        )
    return tuple(given)


def _chosen_tops(top: Any) -> tuple[int, ...]:
    given = [top] if isinstance(top, (SupportsIndex, str)) else list(top)
    tops = sorted(at_least_one(each, "a number of neurons") for each in given)
    if not tops or len(set(tops)) < len(tops):
        raise InputError(f"top must be one or several different numbers of neurons; got {top!r}")
    return tuple(tops)


def _known(
    host: Host, prompts: Any, filtered: bool, prepend_bos: bool | None, progress: bool
) -> KnownPrompts:
    if isinstance(prompts, KnownPrompts):
        return prompts
    if isinstance(prompts, (str, os.PathLike)):
        prompts = load_prompts(prompts)
    limits: dict[str, Any] = {} if filtered else {"top": None, "above_type": False}
    return known_prompts(host, prompts, prepend_bos=prepend_bos, progress=progress, **limits)


def _corrupted(some: Sequence[AskedPrompt], kept: Sequence[AskedPrompt], seed: int) -> list[Any]:
    """For each the same question about something else, where there is one as long."""
    wordings: dict[tuple[str, str], list[AskedPrompt]] = {}
    wanted = {_wording(each) for each in some}
    for each in kept:
        if _wording(each) in wanted:
            wordings.setdefault(_wording(each), []).append(each)
    return [corrupted_of(each, wordings[_wording(each)], seed=seed) for each in some]


def _wording(asked: AskedPrompt) -> tuple[str, str]:
    return asked.prompt.fact.relation, asked.prompt.phrasing


# --- what is found ----------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Found:
    """What has been measured so far, as rows; no result of a batch outlives it."""

    request: _Request
    rows: list[tuple] = field(default_factory=list)
    predicted: list[tuple] = field(default_factory=list)
    correlations: list[tuple] = field(default_factory=list)
    refused: list[tuple] = field(default_factory=list)
    short: int = 0
    origin: Mapping[str, Any] | None = None

    def add(self, host: Host, asked: Sequence[AskedPrompt], corrupted: Sequence[Any]) -> None:
        """Attribute, rank, zero and measure some prompts."""
        request = self.request
        results = _attributed(host, asked, request)
        if self.origin is None:
            self.origin = _origin(results[0])
        found = []
        for result, other in zip(results, corrupted, strict=True):
            case = Case(result=result, corrupted=other)
            found.append(
                ranked(
                    case,
                    request.methods,
                    request.kinds,
                    max(request.tops),
                    every=request.correlate,
                )
            )
        zeroed = [
            conditions(each, request.which, request.tops, request.reference, request.seed)
            for each in found
        ]
        measured = effects([each.case for each in found], zeroed, budget=request.budget)
        for each, of_case, one in zip(asked, measured, found, strict=True):
            self._keep(each, one, *of_case)

    def _keep(
        self, asked: AskedPrompt, found: Ranked, log_prob: float, rank: int, after: list[Effect]
    ) -> None:
        prompt_id, knowledge_type = asked.prompt.prompt_id, asked.prompt.fact.knowledge_type
        self.refused += [(prompt_id, name, why) for name, why in found.refused.items()]
        for effect in after:
            condition = effect.condition
            key = (prompt_id, knowledge_type, condition.method, condition.kind, condition.top)
            self.rows.append((*key, log_prob, rank, effect.log_prob, effect.rank))
            if condition.predicted is not None:
                self.predicted.append((*key, condition.predicted, effect.log_prob - log_prob))
            self.short += condition.short > 0
        if self.request.correlate:
            self.correlations += [
                (prompt_id, knowledge_type, *row) for row in self._correlated(found)
            ]

    def _correlated(self, found: Ranked) -> Iterator[tuple[str, Kind, float]]:
        for kind in self.request.kinds:
            exact = found.scores.get(EXACT, {}).get(kind)
            if exact is None:
                exact = METHODS[EXACT](found.case, kind, None)
            truth = exact.detach().flatten().double().cpu().numpy()
            for name, scores in found.scores.items():
                given = scores[kind].flatten().double().numpy()
                yield name, kind, spearman(given, truth)

    def evaluation(
        self, known: KnownPrompts, asked: Sequence[AskedPrompt], filtered: bool
    ) -> Evaluation:
        """All of it as tables.

        Raises:
            InputError: If a method was applicable to no prompt at all.
        """
        request = self.request
        counts = {name: 0 for name in request.methods}
        for _, name, _ in self.refused:
            counts[name] += 1
        for name, count in counts.items():
            if count == len(asked):
                reason = next(why for _, each, why in self.refused if each == name)
                raise InputError(f"method {name!r} can be used on none of the prompts: {reason}")
        if self.short:
            warnings.warn(_short(self.short), stacklevel=3)
        facts = {
            **(self.origin or {}),
            "methods": list(request.methods),
            "in_nats": [name for name in request.methods if name in IN_NATS],
            "controls": {
                "names": list(CONTROLS),
                "beside": request.reference,
                "smaller_than_it": self.short,
            },
            "kinds": list(request.which),
            "tops": list(request.tops),
            "seed": request.seed,
            "limit": request.limit,
            "prompts": {
                "filtered": filtered,
                "top": known.top,
                "above_type": known.above_type,
                "kept": len(known.kept),
                "dropped": len(known.dropped),
                "measured": len(asked),
                "counts": known.counts().to_dict("records"),
                "sha256": _prompts_hash(asked),
            },
            "without": {name: count for name, count in counts.items() if count},
            "warnings": list(known.warnings) + ([_short(self.short)] if self.short else []),
        }
        dropped = [
            (each.prompt.prompt_id, None, f"{each.reason}: {each.detail}") for each in known.dropped
        ]
        return Evaluation(
            effects=_effect_table(self.rows),
            prompts=_table(
                [_prompt_row(each.prompt) for each in asked], PROMPT_COLUMNS, PROMPT_COLUMNS
            ),
            skipped=_table([*dropped, *self.refused], SKIPPED_COLUMNS, SKIPPED_COLUMNS),
            predicted=_table(self.predicted, PREDICTED_COLUMNS, _TEXTS),
            correlations=_table(self.correlations, CORRELATION_COLUMNS, _TEXTS),
            facts=facts,
        )


def _attributed(host: Host, asked: Sequence[AskedPrompt], request: _Request) -> list[Attribution]:
    questions = [
        Prompt(tokens=each.tokenized.tokens, prompt_id=each.prompt.prompt_id) for each in asked
    ]
    targets = [each.tokenized.target.id for each in asked]  # pyright: ignore
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a processed model, once for every batch
        return attribute_all(
            host.model,
            questions,
            target=targets,
            top=max(request.tops),
            budget=request.budget,
            batch_size=request.batch_size,
        )


# --- as tables --------------------------------------------------------------------------------

_TEXTS = ("prompt_id", "knowledge_type", "method", "kind", "metric")


def _effect_table(rows: Sequence[tuple]) -> pd.DataFrame:
    """Three rows, one a metric, of every row."""
    n = len(METRICS)
    keys = pd.DataFrame([row[:5] for row in rows], columns=list(EFFECT_COLUMNS[:5]))
    table = keys.loc[keys.index.repeat(n)].reset_index(drop=True)
    table["metric"] = list(METRICS) * len(rows)
    numbers = np.array([row[5:] for row in rows], dtype=float)
    for name, log_prob, rank in (("before", *numbers[:, :2].T), ("after", *numbers[:, 2:].T)):
        table[name] = np.stack([1 / rank, np.exp(log_prob), log_prob], axis=1).ravel()
    return table.astype({name: "string" for name in _TEXTS})


def _table(rows: Sequence[tuple], columns: Sequence[str], texts: Sequence[str]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(columns))
    numbers = {name: "int64" if name == "top" else "float64" for name in columns}
    return table.astype(numbers | {name: "string" for name in texts if name in columns})


def _prompt_row(prompt: KnowledgePrompt) -> tuple[str, ...]:
    fact = prompt.fact
    return (
        prompt.prompt_id,
        fact.knowledge_type,
        fact.relation,
        fact.subject,
        prompt.answer,
        prompt.text,
    )


def _prompts_hash(asked: Sequence[AskedPrompt]) -> str:
    """Of ids, tokens and answers, in order: the same where the same was asked."""
    digest = hashlib.sha256()
    for each in asked:
        target = each.tokenized.target
        answer = None if target is None else target.id
        digest.update(f"{each.prompt.prompt_id} {each.tokenized.tokens} {answer}\n".encode())
    return digest.hexdigest()


def _origin(result: Attribution) -> dict[str, Any]:
    """Model, neurons and versions, as of any result."""
    facts = result.facts()
    names = ("model", "neuron_basis", "convention", "score_dtype", "versions")
    return {**{name: facts[name] for name in names}, "model_warnings": facts["warnings"]}


def _short(count: int) -> str:
    return (
        f"{count} controls are smaller than what they stand beside: more than half of a layer's "
        "neurons were chosen there"
    )
