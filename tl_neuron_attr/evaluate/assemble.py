"""What was measured, batch by batch, put together as tables."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.evaluate.effects import CONTROLS, Effect, Ranked
from tl_neuron_attr.evaluate.evaluation import (
    CORRELATION_COLUMNS,
    EFFECT_COLUMNS,
    METRICS,
    PREDICTED_COLUMNS,
    PROMPT_COLUMNS,
    SKIPPED_COLUMNS,
    Chosen,
    Evaluation,
    ranking_table,
)
from tl_neuron_attr.evaluate.request import Request
from tl_neuron_attr.evaluate.statistics import spearman
from tl_neuron_attr.knowledge import AskedPrompt, KnowledgePrompt, KnownPrompts
from tl_neuron_attr.methods import METHODS

EXACT = "ablation"
"""The method that others are correlated with."""

IN_NATS = frozenset(
    {
        "log_prob_increase",
        "gradient_activation",
        "attribution_patching",
        "query",
        "value_and_query",
        "carried_once",
        "carried_back",
        "curved_gradient",
        "ablation",
    }
)
"""Methods whose scores are changes of log p(answer) in nats, as what is measured is."""

RANKED = 100
"""How many of a method's best neurons of each kind are listed, of those that were asked for."""

_TEXTS = ("prompt_id", "knowledge_type", "method", "kind", "metric")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What was measured of some prompts, as rows of the tables to be; no tensor among them."""

    effects: tuple[tuple, ...]
    """Prompt, type, method, kind, number of neurons; log p and rank before, and after."""
    predicted: tuple[tuple, ...]
    correlations: tuple[tuple, ...]
    chosen: tuple[Chosen, ...]
    refused: tuple[tuple[str, str, str], ...]
    """Prompt, method, reason."""
    short: int
    """Controls smaller than what they stand beside."""


def rows_of(
    request: Request,
    asked: AskedPrompt,
    found: Ranked,
    before: tuple[float, int],
    after: Sequence[Effect],
) -> Rows:
    """The rows of one prompt."""
    prompt_id, knowledge_type = asked.prompt.prompt_id, asked.prompt.fact.knowledge_type
    effects, predicted = [], []
    for effect in after:
        condition = effect.condition
        key = (prompt_id, knowledge_type, condition.method, condition.kind, condition.top)
        effects.append((*key, *before, effect.log_prob, effect.rank))
        if condition.predicted is not None:
            predicted.append((*key, condition.predicted, effect.log_prob - before[0]))
    correlations = _correlations(request, found) if request.correlate else ()
    return Rows(
        effects=tuple(effects),
        predicted=tuple(predicted),
        correlations=tuple((prompt_id, knowledge_type, *row) for row in correlations),
        chosen=tuple(_chosen(found, prompt_id, knowledge_type)),
        refused=tuple((prompt_id, name, why) for name, why in found.refused.items()),
        short=sum(effect.condition.short > 0 for effect in after),
    )


def _chosen(found: Ranked, prompt_id: str, knowledge_type: str) -> Iterator[Chosen]:
    for method, ranking in found.rankings.items():
        for kind, numbers in ranking.items():
            scores = found.scores[method][kind]
            numbers = numbers[:RANKED].cpu()
            # of FFN neurons there are two axes, of attention neurons three
            layer, *head, index = np.unravel_index(numbers.numpy(), tuple(scores.shape))
            yield Chosen(
                prompt_id=prompt_id,
                knowledge_type=knowledge_type,
                method=method,
                kind=kind,
                layer=layer,
                head=head[0] if head else None,
                index=index,
                score=scores.flatten()[numbers].double().numpy(),
            )


def _correlations(request: Request, found: Ranked) -> Iterator[tuple[str, str, float]]:
    """Method, kind, rank correlation with exact ablation over all neurons."""
    for kind in request.kinds:
        exact = found.scores[EXACT][kind] if EXACT in found.scores else None
        if exact is None:
            exact = METHODS[EXACT](found.case, kind, None)
        truth = exact.detach().flatten().double().cpu().numpy()
        for name, scores in found.scores.items():
            yield name, kind, spearman(scores[kind].flatten().double().numpy(), truth)


def evaluation_of(
    request: Request,
    known: KnownPrompts,
    asked: Sequence[AskedPrompt],
    parts: Iterable[Rows],
    origin: Mapping[str, Any],
    messages: Sequence[str] = (),
) -> Evaluation:
    """All of it as one result; ``messages`` are what was said of the prompts before.

    Raises:
        InputError: If the method that controls stand beside could be used on no prompt at all.
    """
    parts = list(parts)
    refused = [row for part in parts for row in part.refused]
    without = _without(request, refused)
    unused = _unused(request, len(asked), without, refused)
    short = sum(part.short for part in parts)
    said = [*known.warnings, *messages, *unused.values()]
    said += [short_message(short)] * (short > 0)
    used = [name for name in request.methods if name not in unused]
    facts = {
        **origin,
        "methods": used,
        "in_nats": [name for name in used if name in IN_NATS],
        "controls": {
            "names": list(CONTROLS),
            "beside": request.reference,
            "smaller_than_it": short,
        },
        "kinds": list(request.which),
        "tops": list(request.tops),
        "seed": request.seed,
        "limit": request.limit,
        "prompts": {
            "top": known.top,
            "above_type": known.above_type,
            "kept": len(known.kept),
            "dropped": len(known.dropped),
            "measured": len(asked),
            "counts": known.counts().to_dict("records"),
            "sha256": _prompts_hash(asked),
        },
        "without": without,
        "warnings": said,
    }
    dropped = [
        (each.prompt.prompt_id, None, f"{each.reason}: {each.detail}") for each in known.dropped
    ]
    correlations = [row for part in parts for row in part.correlations]
    return Evaluation(
        effects=_effect_table([row for part in parts for row in part.effects]),
        prompts=_table([_prompt_row(each.prompt) for each in asked], PROMPT_COLUMNS),
        skipped=_table([*dropped, *refused], SKIPPED_COLUMNS),
        predicted=_table([row for part in parts for row in part.predicted], PREDICTED_COLUMNS),
        correlations=_table(correlations, CORRELATION_COLUMNS),
        rankings=ranking_table([each for part in parts for each in part.chosen]),
        facts=facts,
    )


def origin_of(result: Attribution) -> dict[str, Any]:
    """Model, neurons and versions, as any of the results has them."""
    facts = result.facts()
    names = ("model", "neuron_basis", "convention", "score_dtype", "versions")
    return {**{name: facts[name] for name in names}, "model_warnings": facts["warnings"]}


def short_message(count: int) -> str:
    """What to say of controls that could not be as large as they should be."""
    return (
        f"{count} controls are smaller than what they stand beside: more than half of a layer's "
        "neurons were chosen there"
    )


def _without(request: Request, refused: Sequence[tuple[str, str, str]]) -> dict[str, int]:
    """How many prompts each method could not be used on, of those that there are any of."""
    counts = Counter(name for _, name, _ in refused)
    return {name: counts[name] for name in request.methods if name in counts}


def _unused(
    request: Request,
    n_prompts: int,
    without: Mapping[str, int],
    refused: Sequence[tuple[str, str, str]],
) -> dict[str, str]:
    """What to say of methods that could be used on no prompt at all."""
    unused = {}
    for name, count in without.items():
        if count == n_prompts:
            why = next(why for _, method, why in refused if method == name)
            unused[name] = f"method {name!r} can be used on none of the prompts: {why}"
    if request.reference in unused:
        raise InputError(
            f"{unused[request.reference]}; controls stand beside the first method, so give "
            "another first"
        )
    return unused


def _effect_table(rows: Sequence[tuple]) -> pd.DataFrame:
    """Three rows, one a metric, of every row."""
    keys = pd.DataFrame([row[:5] for row in rows], columns=list(EFFECT_COLUMNS[:5]))
    table = keys.loc[keys.index.repeat(len(METRICS))].reset_index(drop=True)
    table["metric"] = list(METRICS) * len(rows)
    numbers = np.array([row[5:] for row in rows], dtype=float)
    for name, log_prob, rank in (("before", *numbers[:, :2].T), ("after", *numbers[:, 2:].T)):
        table[name] = np.stack([1 / rank, np.exp(log_prob), log_prob], axis=1).ravel()
    return table.astype({name: "string" for name in _TEXTS})


def _table(rows: Sequence[tuple], columns: Sequence[str]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(columns))
    numbers = {"top": "int64", "predicted": "float64", "measured": "float64", "spearman": "float64"}
    return table.astype({name: numbers.get(name, "string") for name in columns})


def _prompt_row(prompt: KnowledgePrompt) -> tuple[str, ...]:
    fact = prompt.fact
    named = (fact.knowledge_type, fact.relation, fact.subject)
    return (prompt.prompt_id, *named, prompt.answer, prompt.text)


def _prompts_hash(asked: Sequence[AskedPrompt]) -> str:
    """Of ids, tokens and answers, in order: the same where the same was asked."""
    digest = hashlib.sha256()
    for each in asked:
        target = each.tokenized.target
        answer = None if target is None else target.id
        digest.update(f"{each.prompt.prompt_id} {each.tokenized.tokens} {answer}\n".encode())
    return digest.hexdigest()
