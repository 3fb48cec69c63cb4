"""What it does: each prompt run without the neurons each method chose, and the answer measured.

Zeroed is zeroed at all positions: an FFN neuron's coefficient, an attention neuron's dimension of
``z``. All runs of some prompts go through the model together, a row each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.evaluate.rankings import (
    best,
    check_scores,
    contribution_norms,
    norm_matched,
    on_first,
    random_beside,
    random_keys,
)
from tl_neuron_attr.host import Host
from tl_neuron_attr.interventions import ZeroMask, masked_residuals
from tl_neuron_attr.methods import Case, Method, neuron_shape
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.readout import read_out
from tl_neuron_attr.topk import Kind

Which = Literal["ffn", "attn", "both"]
"""What is zeroed: the best FFN neurons, the best attention neurons, or so many of each."""

KINDS_OF: Mapping[Which, tuple[Kind, ...]] = {
    "ffn": ("ffn",),
    "attn": ("attn",),
    "both": ("ffn", "attn"),
}

RANDOM, NORM_MATCHED = "random", "norm_matched"
CONTROLS = (RANDOM, NORM_MATCHED)

Ranking = Mapping[Kind, Int[Tensor, " _"]]
"""Numbers of one method's best neurons of each kind, best first."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What is zeroed together in one run of one prompt."""

    method: str
    kind: Which
    top: int
    neurons: Ranking
    predicted: float | None = None
    """What the method's scores of these neurons add up to, less than 0 where they say that the
    answer gets less likely; ``None`` of a control."""
    short: int = 0
    """Of a control: how many neurons fewer it is than those it stands beside."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What became of the answer in one run."""

    condition: Condition
    log_prob: float
    """log p(answer), nats; of a contrast the difference of the two."""
    rank: int
    """The answer's place among all tokens, from 1."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """What the methods make of one prompt."""

    case: Case
    rankings: Mapping[str, Ranking]
    """By method: those that could be applied to it."""
    scores: Mapping[str, Mapping[Kind, Tensor]] = field(repr=False)
    """What the methods gave, by method and kind."""
    refused: Mapping[str, str]
    """By method: why it could not."""


def ranked(
    case: Case,
    methods: Mapping[str, Method],
    kinds: Sequence[Kind],
    top: int,
    *,
    every: bool = False,
) -> Ranked:
    """Each method's ``top`` best neurons of each kind.

    A method that raises ``InputError`` is left out of this prompt. With ``every`` all scores are
    true, not those of the best alone.

    Raises:
        InputError: If a method gives something else than scores.
    """
    rankings: dict[str, Ranking] = {}
    scores: dict[str, Mapping[Kind, Tensor]] = {}
    refused: dict[str, str] = {}
    for name, method in methods.items():
        try:
            given = {kind: method(case, kind, None if every else top) for kind in kinds}
        except InputError as error:
            refused[name] = str(error)
            continue
        for kind in kinds:
            check_scores(given[kind], neuron_shape(case.result.host, kind), name)
        scores[name] = {kind: given[kind].detach().cpu() for kind in kinds}
        rankings[name] = {kind: best(scores[name][kind], top) for kind in kinds}
    return Ranked(case=case, rankings=rankings, scores=scores, refused=refused)


def conditions(
    found: Ranked, which: Sequence[Which], tops: Sequence[int], reference: str, seed: int
) -> list[Condition]:
    """All that is zeroed in one prompt: by each method, and by the controls beside ``reference``.

    Where the reference could not be applied to the prompt, there are no controls either.
    """
    made = [
        Condition(
            method=method,
            kind=kind,
            top=top,
            neurons=(chosen := _first(ranking, kind, top)),
            predicted=_predicted(found.scores[method], chosen),
        )
        for kind in which
        for method, ranking in found.rankings.items()
        for top in tops
    ]
    if reference not in found.rankings:
        return made
    controls = _controls(
        found.case, sorted({each for kind in which for each in KINDS_OF[kind]}), seed
    )
    for kind in which:
        for name in CONTROLS:
            for top in tops:
                chosen = _first(found.rankings[reference], kind, top)
                drawn: dict[Kind, Tensor] = {
                    each: controls[each][name](some) for each, some in chosen.items()
                }
                short = sum(len(chosen[each]) - len(drawn[each]) for each in chosen)
                made.append(Condition(method=name, kind=kind, top=top, neurons=drawn, short=short))
    return made


@full_precision()
@torch.no_grad()
def effects(
    cases: Sequence[Case], zeroed: Sequence[Sequence[Condition]], *, budget: int
) -> list[tuple[tuple[float, int], list[Effect]]]:
    """Of each case log p(answer) and its rank as it is, and what becomes of it without each.

    It is the model's own prediction, its final norm taken anew in every run. Cost: one forward
    pass of as many rows as there are conditions, and one for each case.
    """
    host = cases[0].result.host
    nothing = Condition(method="", kind="both", top=0, neurons={})
    cells = [
        (case, each)
        for case, of_case in zip(cases, zeroed, strict=True)
        for each in (nothing, *of_case)
    ]
    prompts = [case.result.captured.prompt for case, _ in cells]
    resid = masked_residuals(host, prompts, lambda row: zero_mask(host, cells[row][1].neurons))
    out = read_out(host, resid[0], "recomputed", budget=budget)
    targets = [case.result.target for case, _ in cells]
    answers = out.answers(resid, targets)
    log_probs = answers.log_prob
    contrasts = [row for row, target in enumerate(targets) if target.against is not None]
    if contrasts:
        log_probs[contrasts] = out.log_prob_of_each(
            resid[contrasts], [targets[row] for row in contrasts]
        )
    runs = iter(zip(log_probs.tolist(), answers.rank.tolist(), strict=True))
    found = []
    for of_case in zeroed:
        before = next(runs)
        after = [
            Effect(condition=each, log_prob=log_prob, rank=rank)
            for each, (log_prob, rank) in zip(of_case, runs, strict=False)
        ]
        found.append((before, after))
    return found


def zero_mask(host: Host, neurons: Ranking) -> ZeroMask:
    """The mask of these neurons, at all positions."""
    masks: dict[Kind, dict[int, Tensor]] = {"ffn": {}, "attn": {}}
    for kind, numbers in neurons.items():
        mask = torch.zeros(neuron_shape(host, kind), dtype=torch.bool)
        mask.view(-1)[numbers] = True
        some = mask.flatten(1).any(1).nonzero()[:, 0].tolist()
        masks[kind] = {layer: mask[layer] for layer in some}
    return ZeroMask(ffn=masks["ffn"], attn=masks["attn"], sources={})


def _first(ranking: Ranking, kind: Which, top: int) -> Ranking:
    return {each: ranking[each][:top] for each in KINDS_OF[kind]}


def _predicted(scores: Mapping[Kind, Tensor], chosen: Ranking) -> float:
    """Zeroing takes away what the scores say the neurons gave."""
    return -sum(float(scores[kind].flatten()[some].double().sum()) for kind, some in chosen.items())


Draw = Callable[[Int[Tensor, " chosen"]], Int[Tensor, " drawn"]]


def _controls(case: Case, kinds: Sequence[Kind], seed: int) -> dict[Kind, dict[str, Draw]]:
    """Both controls of each kind, as functions of what was chosen."""
    made: dict[Kind, dict[str, Draw]] = {}
    for kind in kinds:
        norms = contribution_norms(case.result, kind).cpu()
        shape = (norms.shape[0], norms.shape[1])
        keys = random_keys(shape, seed, case.result.captured.prompt.prompt_id, kind)
        keys = on_first(case.result, kind, keys)
        made[kind] = {
            RANDOM: lambda chosen, keys=keys: random_beside(chosen, keys),
            NORM_MATCHED: lambda chosen, norms=norms: norm_matched(chosen, norms),
        }
    return made
