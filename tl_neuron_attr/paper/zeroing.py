"""What happens without them: each test of the paper, as runs of every prompt with neurons zeroed.

The runs themselves are ``evaluate``'s and ``interventions``'; here is which neurons each test
takes. Random neurons are drawn from the same layers, as many (or all others of a layer
where more than half of it was chosen), by the seed and the prompt's id.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from tl_neuron_attr.evaluate.effects import Condition, Ranking, conditions, effects, ranked
from tl_neuron_attr.evaluate.rankings import best, random_beside, random_keys
from tl_neuron_attr.host import Host
from tl_neuron_attr.interventions import Zeroed, zeroed_residuals
from tl_neuron_attr.methods import LETTERS, METHODS, Case, neuron_shape
from tl_neuron_attr.neurons import Head
from tl_neuron_attr.paper.settings import (
    METHOD_TOP,
    SHALLOW_QUERY,
    VALUE_ATTN,
    VALUE_FFN,
    Sizes,
    sizes,
)
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import TokenizedPrompt
from tl_neuron_attr.query import QueryScores
from tl_neuron_attr.readout import DEFAULT_BUDGET, read_out
from tl_neuron_attr.topk import Kind

AS_PUBLISHED, IN_PROPORTION = "as published", "in proportion"

PAPER_METHODS = tuple(LETTERS.values())
"""The eight static methods, in the order of the paper's table."""

EFFECT_COLUMNS = (
    "knowledge_type",
    "prompt_id",
    "test",
    "scale",
    "method",
    "ffn",
    "attn",
    "log_prob_before",
    "rank_before",
    "log_prob",
    "rank",
)


def zero_neurons(
    cases: Sequence[Case], queries: Sequence[QueryScores], knowledge_type: str, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What becomes of each answer in the paper's tests, and where the methods' neurons lie.

    The first table has a row a prompt and run: ``test`` (``methods``, ``value_neurons``,
    ``shallow_query_neurons``), ``scale`` (``as published`` or ``in proportion``), ``method``
    (``random`` and ``norm_matched`` are controls), how many ``ffn`` and ``attn`` neurons were
    zeroed, log p(answer) in nats and the answer's rank before and after. The second counts by
    ``layer`` the FFN neurons each ``method`` chose.

    Cost: the eight methods' scores (``rank`` reads every neuron out), and one forward pass of 18
    rows for each prompt.
    """
    methods = {name: METHODS[name] for name in PAPER_METHODS}
    zeroed, tests, chosen = [], [], []
    for case, scores in zip(cases, queries, strict=True):
        found = ranked(case, methods, ["ffn"], METHOD_TOP)
        reference = PAPER_METHODS[0]
        runs = [
            (("methods", AS_PUBLISHED), each)
            for each in conditions(found, ["ffn"], [METHOD_TOP], reference, seed)
        ]
        size = sizes(case.result.host)
        runs += _value_runs(case, size, seed)
        runs += _query_runs(case, scores, size, seed)
        zeroed.append([each for _, each in runs])
        tests.append([test for test, _ in runs])
        chosen += [
            (method, int(number) // case.result.host.d_mlp)
            for method, ranking in found.rankings.items()
            for number in ranking["ffn"]
        ]
    rows = []
    for case, of_case, ((log_prob, rank), after) in zip(
        cases, tests, effects(cases, zeroed, budget=DEFAULT_BUDGET), strict=True
    ):
        for test, effect in zip(of_case, after, strict=True):
            counts = {kind: len(some) for kind, some in effect.condition.neurons.items()}
            rows.append(
                (
                    knowledge_type,
                    case.result.captured.prompt.prompt_id,
                    *test,
                    effect.condition.method,
                    counts.get("ffn", 0),
                    counts.get("attn", 0),
                    log_prob,
                    rank,
                    effect.log_prob,
                    effect.rank,
                )
            )
    layers = pd.DataFrame(chosen, columns=["method", "layer"])
    counted = layers.value_counts(sort=False).rename("neurons").reset_index()
    counted.insert(0, "knowledge_type", knowledge_type)
    return pd.DataFrame(rows, columns=list(EFFECT_COLUMNS)), counted


Run = tuple[tuple[str, str], Condition]


def _value_runs(case: Case, size: Sizes, seed: int) -> list[Run]:
    """The best attention and FFN value neurons together, and random ones."""
    score = METHODS[PAPER_METHODS[0]]
    scores: dict[Kind, Tensor] = {
        "ffn": score(case, "ffn", VALUE_FFN),
        "attn": score(case, "attn", VALUE_ATTN),
    }
    counts: dict[str, dict[Kind, int]] = {
        AS_PUBLISHED: {"ffn": VALUE_FFN, "attn": VALUE_ATTN},
        IN_PROPORTION: {"ffn": size.value_ffn, "attn": size.value_attn},
    }
    runs = []
    for scale, count in counts.items():
        chosen: dict[Kind, Tensor] = {
            kind: best(scores[kind].cpu(), number) for kind, number in count.items()
        }
        runs += _beside_random(case, "value_neurons", scale, chosen, seed)
    return runs


def _query_runs(case: Case, queries: QueryScores, size: Sizes, seed: int) -> list[Run]:
    """The best query FFN neurons of the shallow layers, and random ones of the same layers."""
    each = queries.ffn_neurons.clone()
    each[min(size.shallow_layers, queries.ffn_depth) :] = float("-inf")
    each[each <= 0] = float("-inf")
    runs = []
    # the published number would be most of the shallow layers of a small model
    scales = {AS_PUBLISHED: SHALLOW_QUERY} if size.shallow_query == SHALLOW_QUERY else {}
    for scale, count in {**scales, IN_PROPORTION: size.shallow_query}.items():
        chosen: Ranking = {"ffn": best(each.cpu(), count)}
        runs += _beside_random(case, "shallow_query_neurons", scale, chosen, seed)
    return runs


def _beside_random(case: Case, test: str, scale: str, chosen: Ranking, seed: int) -> list[Run]:
    host, prompt_id = case.result.host, case.result.captured.prompt.prompt_id

    def drawn(kind: Kind) -> Tensor:
        n_layers, *rest = neuron_shape(host, kind)
        shape = (n_layers, int(torch.tensor(rest).prod()))
        return random_beside(chosen[kind], random_keys(shape, seed, prompt_id, test, kind))

    which = "both" if len(chosen) == 2 else next(iter(chosen))
    count = sum(len(some) for some in chosen.values())
    make = partial(Condition, kind=which, top=count)
    return [
        ((test, scale), make(method=test, neurons=chosen)),
        ((test, scale), make(method="random", neurons={kind: drawn(kind) for kind in chosen})),
    ]


@torch.no_grad()
@full_precision()
def zero_heads(
    host: Host,
    prompts: Sequence[TokenizedPrompt],
    heads: Mapping[str, Iterable[Head]],
    knowledge_type: str,
) -> pd.DataFrame:
    """What becomes of each prompt's answer without each set of heads.

    ``knowledge_type, prompt_id, heads_of`` (whose heads, or ``random``), log p(answer) in nats and
    the answer's rank before and after. The prompts carry their answers as targets. Cost: one
    forward pass of a row for each set, and one more, for each prompt.
    """
    sets = {"": Zeroed(), **{name: Zeroed(tuple(each)) for name, each in heads.items()}}
    cells = [(prompt, name) for prompt in prompts for name in sets]
    asked = [prompt for prompt, _ in cells]
    resid = zeroed_residuals(host, asked, [sets[name] for _, name in cells])
    targets = [prompt.target for prompt in asked if prompt.target is not None]
    answers = read_out(host, resid[0], "recomputed").answers(resid, targets)
    shape = (len(prompts), len(sets))
    log_prob = answers.log_prob.reshape(shape).double().cpu()
    rank = answers.rank.reshape(shape).cpu()
    return pd.DataFrame(
        {
            "knowledge_type": knowledge_type,
            "prompt_id": [prompt.prompt_id for prompt in prompts for _ in heads],
            "heads_of": [*heads] * len(prompts),
            "log_prob_before": log_prob[:, :1].expand(-1, len(heads)).flatten().numpy(),
            "rank_before": rank[:, :1].expand(-1, len(heads)).flatten().numpy(),
            "log_prob": log_prob[:, 1:].flatten().numpy(),
            "rank": rank[:, 1:].flatten().numpy(),
        }
    )
