"""What a run measures of a prompt beside its attribution: other methods' neurons, and zeroing.

A method's best neurons are ranked as ``evaluate`` ranks them, from the capture there is; zeroing is
``evaluate``'s too, so that both say the same of one prompt. Attention neurons are summed over
source positions in both, for that is what a row of ``W_O`` is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.evaluate.effects import (
    KINDS_OF,
    RANDOM,
    Condition,
    Ranking,
    Which,
    effects,
    ranked,
)
from tl_neuron_attr.evaluate.rankings import on_first, random_beside, random_keys
from tl_neuron_attr.host import Host
from tl_neuron_attr.methods import METHODS, Case, neuron_shape
from tl_neuron_attr.methods.gradients import check_differentiable
from tl_neuron_attr.prompts import Target
from tl_neuron_attr.query import QueryScores, top_query_neurons
from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.topk import Kind

Columns = Mapping[str, np.ndarray]
"""Rows of one prompt in one table; names, such as a kind, as places in ``rows.NAMES``."""

KINDS: tuple[Kind, Kind] = ("ffn", "attn")
ZEROED_KINDS: tuple[Which, ...] = ("ffn", "attn", "both")
VALUE, QUERY = "value", "query"
TOP = "top"
ROLES, SETS = (VALUE, QUERY), (TOP, RANDOM)

_BY_GRADIENTS = ("gradient_activation", "integrated_gradients", "curved_gradient")
_BY_QUERY = ("query",)
_OF_TOKENS = ("prob_increase", "rank", "coefficient_rank")


def check_measurable(host: Host, settings: RunSettings) -> None:
    """Stop before anything is run where the model cannot be measured as asked.

    Raises:
        InputError: If a method cannot be used on it, or it has fewer neurons than are to be zeroed.
    """
    if set(settings.methods) & set(_BY_GRADIENTS):
        check_differentiable(host)
    if host.n_layers == 1 and set(settings.methods) & set(_BY_QUERY):
        raise InputError(
            "the method query needs layers before the value neurons, and the model has one layer; "
            "leave it out"
        )
    if not settings.zero:
        return
    for kind in KINDS:
        there_are = math.prod(neuron_shape(host, kind))
        if settings.zero[-1] > there_are:
            raise InputError(
                f"zero is {settings.zero[-1]}, but the model has {there_are} {kind} neurons"
            )


def why_not(settings: RunSettings, target: Target | None) -> str | None:
    """Why a prompt with this target cannot be measured as asked, if so."""
    if target is not None and not target.is_token and target.against is None:
        return (
            f"a run's tables hold one token as target, not {target.words}; leave the others out, "
            "or attribute the prompt by itself"
        )
    refusing = [name for name in settings.methods if name in _OF_TOKENS]
    if target is None or target.against is None or not refusing:
        return None
    return (
        f"the method {refusing[0]} has no scores of a contrast; leave it out, or ask without "
        "against"
    )


# --- other methods ----------------------------------------------------------------------------


def method_columns(result: Attribution, settings: RunSettings) -> Columns:
    """Each method's best neurons of each kind, ranked; source positions are empty.

    Raises:
        InputError: If a method cannot be used on the prompt.

    Cost: each method's own; those of one forward pass (``methods/static.py``) run no model.
    """
    found = _ranked(Case(result=result), settings.methods, KINDS, settings.top)
    pieces = [
        _method_piece(result, number, kind, found.rankings[name], found.scores[name])
        for number, name in enumerate(settings.methods)
        for kind in KINDS
    ]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _ranked(case: Case, names: Sequence[str], kinds: Sequence[Kind], top: int):
    found = ranked(case, {name: METHODS[name] for name in names}, kinds, top)
    for name, reason in found.refused.items():
        raise InputError(f"method {name}: {reason}")
    return found


def _method_piece(
    result: Attribution, method: int, kind: Kind, ranking: Ranking, scores: Mapping[Kind, Tensor]
) -> dict[str, np.ndarray]:
    best = ranking[kind]
    captured = result.captured
    coefficients = captured.mlp_post if kind == "ffn" else captured.z
    place = torch.unravel_index(best, scores[kind].shape)
    return {
        "method": np.full(len(best), method),
        "kind": np.full(len(best), KINDS.index(kind)),
        "layer": place[0].numpy(),
        "head": place[1].numpy() if kind == "attn" else np.full(len(best), -1),
        "index": place[-1].numpy(),
        "source_pos": np.full(len(best), -1),
        "coefficient": coefficients.flatten()[best.to(coefficients.device)].float().cpu().numpy(),
        "score": scores[kind].flatten()[best].numpy(),
        "rank": np.arange(1, len(best) + 1),
    }


# --- interventions ----------------------------------------------------------------------------


def intervention_columns(
    results: Sequence[Attribution], queries: Sequence[QueryScores | None], settings: RunSettings
) -> list[Columns]:
    """What zeroing the best neurons does to each prompt's answer, and zeroing random ones.

    The best value neurons of either kind and of both; where ``queries`` are given also the best
    query FFN neurons, those of them that score above 0. Beside each stand as many others of the
    same layers, drawn by the seed and the prompt's id alone.

    Cost: the search for the best attention neurons summed over source positions, and a row of a
    forward pass for each set, number and control, all prompts together, 4,096 tokens at a time.
    """
    cases = [Case(result=result) for result in results]
    runs = [
        _value_runs(case, settings)
        + ([] if scores is None else _query_runs(case, scores, settings))
        for case, scores in zip(cases, queries, strict=True)
    ]
    measured = effects(
        cases, [[run for _, run in of_case] for of_case in runs], budget=settings.budget
    )
    return [
        _intervention_rows([role for role, _ in of_case], before, after)
        for of_case, (before, after) in zip(runs, measured, strict=True)
    ]


_Run = tuple[str, Condition]
"""A role, and what is zeroed."""


def _value_runs(case: Case, settings: RunSettings) -> list[_Run]:
    name = "log_prob_increase"
    ranking = _ranked(case, [name], KINDS, settings.zero[-1]).rankings[name]
    return [
        run
        for which in ZEROED_KINDS
        for count in settings.zero
        for run in _beside_random(
            case,
            VALUE,
            which,
            {kind: ranking[kind][:count] for kind in KINDS_OF[which]},
            count,
            settings.seed,
        )
    ]


def _query_runs(case: Case, scores: QueryScores, settings: RunSettings) -> list[_Run]:
    result = case.result
    if bool(scores.left_out.all()):
        return []
    found = top_query_neurons(
        result.host, result.captured, scores, settings.zero[-1], "ffn"
    ).neurons
    numbers = (found.layer * result.host.d_mlp + found.index)[found.score > 0].cpu()
    return [
        run
        for count in settings.zero
        if len(numbers)
        for run in _beside_random(
            case, QUERY, "ffn", {"ffn": numbers[:count]}, count, settings.seed
        )
    ]


def _beside_random(
    case: Case, role: str, which: Which, chosen: Ranking, count: int, seed: int
) -> list[_Run]:
    host, prompt_id = case.result.host, case.result.captured.prompt.prompt_id
    drawn = {}
    for kind, numbers in chosen.items():
        n_layers, *rest = neuron_shape(host, kind)
        # value neurons' controls are those that ``evaluate`` draws
        names = (prompt_id, kind) if role == VALUE else (prompt_id, role, kind)
        keys = random_keys((n_layers, math.prod(rest)), seed, *names)
        drawn[kind] = random_beside(numbers, on_first(case.result, kind, keys))
    return [
        (role, Condition(method=name, kind=which, top=count, neurons=neurons))
        for name, neurons in ((TOP, chosen), (RANDOM, drawn))
    ]


def _intervention_rows(
    roles: Sequence[str], before: tuple[float, int], after: Sequence[Any]
) -> Columns:
    conditions = [each.condition for each in after]
    return {
        "role": np.array([ROLES.index(role) for role in roles]),
        "set": np.array([SETS.index(each.method) for each in conditions]),
        "kind": np.array([ZEROED_KINDS.index(each.kind) for each in conditions]),
        "count": np.array([each.top for each in conditions]),
        "zeroed": np.array(
            [sum(len(some) for some in each.neurons.values()) for each in conditions]
        ),
        "log_prob_before": np.full(len(after), before[0]),
        "rank_before": np.full(len(after), before[1]),
        "log_prob": np.array([each.log_prob for each in after]),
        "rank": np.array([each.rank for each in after]),
    }
