"""Measure what the critics of static localisation say of it: python docs/critics.py

Writes pages/critics.json and prints the tables that the page "What it shows and does not" has. Of
``tiny-facts``, on prompts that it answers rightly, drawn with seed 0; on one CPU core about seven
minutes.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tl_neuron_attr import attribute, open_host
from tl_neuron_attr.knowledge import KNOWLEDGE_TYPES, KnowledgePrompt, knowledge_prompts, load_facts
from tl_neuron_attr.methods import METHODS, Case
from tl_neuron_attr.models import load_model
from tl_neuron_attr.tiny_facts import tiny_facts_dir
from tl_neuron_attr.tiny_facts.accuracy import prompt_groups, top1_correct
from tl_neuron_attr.tiny_facts.editing import (
    answer_gradient,
    explained,
    fit_edits,
    output_weight,
    probabilities_with,
    rank_correlations,
)
from tl_neuron_attr.tiny_facts.resampling import Interval, interval, mean, ratio
from tl_neuron_attr.tiny_facts.self_repair import (
    MEASURES,
    Parts,
    RemovalEffects,
    best_as_parts,
    layers_as_parts,
    removal_effects,
)
from tl_neuron_attr.tiny_facts.wordings import (
    KINSHIPS,
    left_without,
    mask_of,
    overlap,
    ranked_ffn_neurons,
    relatives,
)
from tl_neuron_attr.tiny_facts.zeroing import random_beside

PAGES = Path(__file__).parent / "pages"
SEED = 0

REPAIR_PER_TYPE = 60
VALUE_NEURONS = 10

LEAST_EFFECT = 0.05
"""Where the interval of a direct effect (logit) reaches below this, it is not divided by."""

WORDINGS_PER_TYPE = 30
TOPS = (10, 30, 100)
LISTED = 30
"""How long the lists are whose overlap is measured."""
RANKINGS = {
    "log_prob_increase": "value neurons (a)",
    "gradient_activation": "gradient × activation",
    "ablation": "one-by-one ablation",
    "query": "query neurons",
}
COMPARED = ("log_prob_increase", "gradient_activation", "query")
"""Rankings of every relative's neurons too; ablation of them all would take half an hour."""

EDITED_PER_TYPE = 20
RADII = (0.05, 0.1, 0.2)
"""How long an edit may be, as a share of the mean Frobenius norm of the layers' ``W_out``."""
NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True)
class Bundled:
    """The bundled model as Hugging Face and as TransformerLens have it, and what it knows."""

    model: GPT2LMHeadModel
    bridge: TransformerBridge
    tokenizer: Tokenizer
    known: tuple[KnowledgePrompt, ...]
    """All prompts, held-out wordings too, whose answer is the model's first prediction."""

    def nothing(self, n_prompts: int) -> Tensor:
        """For each prompt no FFN neuron: shape [prompt, layer, d_mlp]."""
        host = open_host(self.bridge)
        return torch.zeros(n_prompts, host.n_layers, host.d_mlp, dtype=torch.bool)

    def token(self, answer: str) -> int:
        """The id of an answer with its leading space."""
        (token,) = self.tokenizer.encode(answer)
        return token


def bundled() -> Bundled:
    """``tiny-facts``, and all prompts that it answers rightly."""
    model = GPT2LMHeadModel.from_pretrained(tiny_facts_dir(), local_files_only=True)
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_facts_dir(), local_files_only=True)
    prompts = knowledge_prompts(trained=True)
    correct = top1_correct(model, tokenizer, prompts).tolist()
    known = tuple(prompt for prompt, right in zip(prompts, correct, strict=True) if right)
    bridge = load_model("tiny-facts", device="cpu")
    return Bundled(model=model, bridge=bridge, tokenizer=tokenizer, known=known)


def drawn(
    known: Iterable[KnowledgePrompt], per_type: int, generator: torch.Generator
) -> list[KnowledgePrompt]:
    """``per_type`` facts of each knowledge type, each in one of its trained wordings."""
    pool = [prompt for prompt in known if not prompt.held_out]
    shuffled = [pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()]
    one_each = {prompt.fact: prompt for prompt in reversed(shuffled)}
    by_type = defaultdict(list)
    for prompt in one_each.values():
        by_type[prompt.fact.knowledge_type].append(prompt)
    return [prompt for name in KNOWLEDGE_TYPES for prompt in by_type[name][:per_type]]


# --- 1. self-repair ---------------------------------------------------------------------------


def self_repair(b: Bundled, per_type: int = REPAIR_PER_TYPE) -> dict[str, Any]:
    """Direct and total effect of every layer and of the best value neurons, over all prompts."""
    host = open_host(b.bridge)
    prompts = drawn(b.known, per_type, torch.Generator().manual_seed(SEED))
    results = [
        attribute(b.bridge, prompt.text, target=prompt.answer, top=VALUE_NEURONS)
        for prompt in prompts
    ]
    effects: dict[str, list[RemovalEffects]] = {"zero": [], "resample": []}
    layers = layers_as_parts(host)
    for number, result in enumerate(results):
        ffn, attn = (
            METHODS["log_prob_increase"](Case(result=result), kind, VALUE_NEURONS)
            for kind in ("ffn", "attn")
        )
        best = best_as_parts(host, ffn, attn, VALUE_NEURONS)
        parts = Parts(
            ffn=torch.cat([layers.ffn, best.ffn]), attn=torch.cat([layers.attn, best.attn])
        )
        other = results[(number + per_type) % len(results)]  # of the next knowledge type
        for mode, instead in (("zero", None), ("resample", other.captured)):
            effects[mode].append(
                removal_effects(host, result.captured, result.target.id, parts, instead=instead)
            )
    rows = _rows_of_parts(host.n_layers, VALUE_NEURONS)
    return {
        "prompts": len(prompts),
        "parts": {
            mode: {name: _repaired(each, numbers) for name, numbers in rows.items()}
            for mode, each in effects.items()
        },
        "compensation": {
            mode: _rounded(
                torch.stack([effect.compensation for effect in each]).mean(0)[: len(layers)]
            )
            for mode, each in effects.items()
        },
    }


def _rows_of_parts(n_layers: int, top: int) -> dict[str, list[int]]:
    """The table's rows, and the parts that each of them sums up."""
    kinds = ("attention", "FFN")
    rows = {f"{kinds[i % 2]} layer {i // 2}": [i] for i in range(2 * n_layers)}
    first = 2 * n_layers
    for kind in ("FFN", "attention"):
        rows[f"{top} value neurons, {kind}, one by one"] = list(range(first, first + top))
        rows[f"{top} value neurons, {kind}, all at once"] = [first + top]
        first += top + 1
    return rows


def _repaired(effects: Sequence[RemovalEffects], numbers: list[int]) -> dict[str, Any]:
    """Of some parts, summed up in each prompt: mean effects and what share of them is repaired."""
    found = {}
    for place, measure in enumerate(MEASURES):
        direct, renormed, total = (
            torch.stack([getattr(each, name)[numbers, place].sum() for each in effects])
            for name in ("direct", "renormed", "total")
        )
        found[measure] = {
            "direct": _ends(mean(direct)),
            "norm_gives": _ends(mean(direct - renormed)),
            "later_give": _ends(mean(renormed - total)),
            "total": _ends(mean(total)),
            "repaired": _ends(ratio(direct - total, direct)),
            "by_norm": _ends(ratio(direct - renormed, direct)),
            "by_later": _ends(ratio(renormed - total, direct)),
            "prompts_repaired": round(float((total < direct).double().mean()), 4),
            "prompts_overcorrected": round(float(((total < 0) & (direct > 0)).double().mean()), 4),
        }
    return found


def repair_table(facts: dict[str, Any]) -> str:
    """The page's table of direct and total effects, as Markdown."""
    lines = [
        "| removed | direct | the norm gives back | later layers give back | total "
        "| repaired | repaired, resampled |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, zeroed in facts["parts"]["zero"].items():
        row = zeroed["logit"]
        resampled = facts["parts"]["resample"][name]["logit"]
        cells = [_plain(row[key][0], 2) for key in ("direct", "norm_gives", "later_give", "total")]
        cells += [_share(each) for each in (row, resampled)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compensation_table(facts: dict[str, Any]) -> str:
    """What each block gives the answer's logit back when an earlier one is zeroed, as Markdown."""
    removed = facts["compensation"]["zero"]
    names = [f"{kind}{layer}" for layer in range(len(removed) // 2) for kind in "AF"]
    lines = ["| removed | " + " | ".join(names[1:]) + " |", "|---|" + "---|" * len(names[1:])]
    layers = list(facts["parts"]["zero"].items())[: len(names) - 1]  # after the last comes none
    for place, (name, row) in enumerate(layers):
        if row["logit"]["direct"][1] < LEAST_EFFECT:
            continue
        cells = [f"{each:+.2f}" for each in removed[place][place + 1 :]]
        lines.append(f"| {name} | " + "| " * place + " | ".join(cells) + " |")
    return "\n".join(lines)


def repair_nats_table(facts: dict[str, Any]) -> str:
    """The same in nats, of neurons and of the layers that hold most, as Markdown."""
    lines = [
        "| removed | direct | total | direct, resampled | total, resampled |",
        "|---|---|---|---|---|",
    ]
    for name, zeroed in facts["parts"]["zero"].items():
        pair = (zeroed["log_prob"], facts["parts"]["resample"][name]["log_prob"])
        cells = [_with_ends(row[key], 3) for row in pair for key in ("direct", "total")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(row: dict[str, Any]) -> str:
    """A share of a direct effect, where there is an effect to speak of."""
    if row["direct"][1] < LEAST_EFFECT:
        return "–"
    return _percent(row["repaired"])


# --- 2. knowledge, or the expression of a token -----------------------------------------------


def wordings(b: Bundled, per_type: int = WORDINGS_PER_TYPE) -> dict[str, Any]:
    """What zeroing a prompt's neurons does to prompts related to it, and whose neurons they are."""
    generator = torch.Generator().manual_seed(SEED)
    sample = drawn(b.known, per_type, generator)
    every = [ranked_ffn_neurons(b.bridge, each, RANKINGS, max(TOPS)) for each in sample]
    whole = [place for place, own in enumerate(every) if all(map(len, own.values()))]
    prompts = [sample[place] for place in whole]
    ranked = [every[place] for place in whole]
    asked = [(owner, "itself", prompt) for owner, prompt in enumerate(prompts)]
    for owner, prompt in enumerate(prompts):
        for kinship, kin in relatives(prompt, b.known, generator).items():
            asked += [(owner, kinship, other) for other in kin]
    owners, kinships, texts = (list(each) for each in zip(*asked, strict=True))
    ranked += [
        ranked_ffn_neurons(b.bridge, each, COMPARED, LISTED) for each in texts[len(prompts) :]
    ]
    nothing = b.nothing(len(asked))
    _, n_layers, d_mlp = nothing.shape
    before = left_without(b.model, b.tokenizer, texts, nothing)
    facts: dict[str, Any] = {
        "prompts": len(prompts),
        "prompts_left_out": len(sample) - len(prompts),
        "before": _by_kinship(kinships, before.probability),
        "rankings": {method: {} for method in RANKINGS},
    }
    for method in RANKINGS:
        for top in TOPS:
            own = [mask_of(each[method][:top], n_layers, d_mlp) for each in ranked[: len(prompts)]]
            zeroed = torch.stack([own[owner] for owner in owners])
            left = left_without(b.model, b.tokenizer, texts, zeroed)
            facts["rankings"][method][top] = {
                "probability": _by_kinship(kinships, left.probability),
                "first": _by_kinship(kinships, left.first.double()),
            }
            if (method, top) == (COMPARED[0], LISTED):
                control = random_beside(torch.stack(own), generator)
                left = left_without(b.model, b.tokenizer, prompts, control)
                facts["random"] = _ends(mean(left.probability))
    facts["overlap"] = {
        method: _by_kinship(
            kinships,
            torch.tensor(
                [
                    overlap(ranked[owner][method][:LISTED], each[method][:LISTED])
                    for owner, each in zip(owners, ranked, strict=True)
                ]
            ),
        )
        for method in COMPARED
    }
    return facts


def _by_kinship(kinships: Sequence[str], values: Tensor) -> dict[str, Any]:
    """Mean, interval and number of prompts of each kinship."""
    found = {}
    for kinship in ("itself", *KINSHIPS):
        some = torch.tensor([kinship == name for name in kinships])
        found[kinship] = {"prompts": int(some.sum()), "mean": _ends(mean(values[some]))}
    return found


def wordings_table(facts: dict[str, Any], top: int = LISTED) -> str:
    """The page's table of what is left of related answers, as Markdown."""
    lines = [
        "| asked | prompts | before | " + " | ".join(RANKINGS.values()) + " |",
        "|---|---|---|" + "---|" * len(RANKINGS),
    ]
    for kinship in ("itself", *KINSHIPS):
        before = facts["before"][kinship]
        cells = [str(before["prompts"]), f"{before['mean'][0]:.2f}"]
        for method in RANKINGS:
            left = facts["rankings"][method][str(top)]["probability"][kinship]
            cells.append(_with_ends(left["mean"], 2))
        lines.append(f"| {kinship} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def first_table(facts: dict[str, Any], method: str = "log_prob_increase") -> str:
    """How often the answer stays first, by the number of neurons zeroed, as Markdown."""
    lines = [
        "| asked | " + " | ".join(f"{top} zeroed" for top in TOPS) + " |",
        "|---|" + "---|" * len(TOPS),
    ]
    for kinship in ("itself", *KINSHIPS):
        by_top = facts["rankings"][method]
        cells = [f"{by_top[str(top)]['first'][kinship]['mean'][0]:.0%}" for top in TOPS]
        lines.append(f"| {kinship} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overlap_table(facts: dict[str, Any]) -> str:
    """The page's table of shared neurons, as Markdown."""
    lines = [
        "| the other prompt | " + " | ".join(RANKINGS[method] for method in COMPARED) + " |",
        "|---|" + "---|" * len(COMPARED),
    ]
    for kinship in KINSHIPS:
        cells = [_percent(facts["overlap"][method][kinship]["mean"]) for method in COMPARED]
        lines.append(f"| {kinship} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- 3. localisation and editing --------------------------------------------------------------

OUTCOMES = {
    "rewrite": "new answer, this wording",
    "trained wording": "new answer, another trained wording",
    "held-out wording": "new answer, a held-out wording",
    "same relation": "right answer, other subjects of the relation",
    "another type": "right answer, another knowledge type",
}
REWORDED = {
    "trained wording": "same fact, another trained wording",
    "held-out wording": "same fact, a held-out wording",
}
"""Outcomes that should follow the edit, and the kinship of the prompts that tell."""
UNTOUCHED = {
    "same relation": "same wording, another subject and answer",
    "another type": "another knowledge type",
}
"""Outcomes that should not."""
SCORES = {
    "increase": "Imp of the layer's FFN",
    "zeroing": "log p lost without the layer's FFN",
    "gradient": "length of the edit's gradient",
}


def editing(b: Bundled, per_type: int = EDITED_PER_TYPE) -> dict[str, Any]:
    """Edits of each layer of each prompt: how they turn out, and what each layer's scores are."""
    generator = torch.Generator().manual_seed(SEED)
    prompts = drawn(b.known, per_type, generator)
    new = torch.tensor([b.token(_another_answer(prompt, generator)) for prompt in prompts])
    probes = _probes(b, prompts, new, generator)
    scores = _layer_scores(b, prompts, new)
    outcomes = {radius: _outcomes(b, prompts, new, probes, radius) for radius in RADII}
    n_layers = b.model.config.n_layer
    facts: dict[str, Any] = {
        "prompts": len(prompts),
        "scores": {name: _by_layer(values) for name, values in scores.items()},
        "radii": {},
    }
    for radius, found in outcomes.items():
        rewrite = found["rewrite"]
        chosen = {name: values.argmax(-1) for name, values in scores.items()}
        chosen["one layer for all, the best on the other half"] = _best_elsewhere(rewrite)
        chosen["the best for each prompt, in hindsight"] = rewrite.argmax(-1)
        facts["radii"][radius] = {
            "by_layer": {name: _by_layer(values) for name, values in found.items()},
            "explained": {
                name: _explained(found[name], scores) for name in ("rewrite", "held-out wording")
            },
            "rank_correlation": {
                name: {
                    "all": _ends(mean(rank_correlations(values, rewrite))),
                    "after_first": _ends(mean(rank_correlations(values[:, 1:], rewrite[:, 1:]))),
                }
                for name, values in scores.items()
            },
            "chosen": {
                name: {
                    outcome: _ends(mean(values.gather(1, layers[:, None])[:, 0]))
                    for outcome, values in found.items()
                }
                | {"layers": layers.bincount(minlength=n_layers).tolist()}
                for name, layers in chosen.items()
            },
            "any_layer": {name: _ends(mean(values.mean(-1))) for name, values in found.items()},
        }
    return facts


def _another_answer(prompt: KnowledgePrompt, generator: torch.Generator) -> str:
    """Another answer of the prompt's relation, with its leading space."""
    fact = prompt.fact
    answers = {
        other.answer
        for other in load_facts(fact.knowledge_type, trained=True)
        if other.relation == fact.relation
    }
    others = sorted(answers - {fact.answer, *fact.aliases})
    return f" {others[int(torch.randint(len(others), (), generator=generator))]}"


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Prompts asked under an edit: whose edit, which answer is looked for, and what for."""

    prompts: list[KnowledgePrompt]
    owners: Tensor
    answers: Tensor
    outcomes: list[str]


def _probes(
    b: Bundled, prompts: Sequence[KnowledgePrompt], new: Tensor, generator: torch.Generator
) -> Probes:
    asked: list[tuple[KnowledgePrompt, int, int, str]] = []
    for owner, prompt in enumerate(prompts):
        kin = relatives(prompt, b.known, generator, count=NEIGHBOURS)
        asked.append((prompt, owner, int(new[owner]), "rewrite"))
        for outcome, kinship in REWORDED.items():
            asked += [(other, owner, int(new[owner]), outcome) for other in kin[kinship]]
        for outcome, kinship in UNTOUCHED.items():
            asked += [(other, owner, b.token(other.answer), outcome) for other in kin[kinship]]
    who, owners, answers, outcomes = zip(*asked, strict=True)
    return Probes(
        prompts=list(who),
        owners=torch.tensor(owners),
        answers=torch.tensor(answers),
        outcomes=list(outcomes),
    )


def _layer_scores(b: Bundled, prompts: Sequence[KnowledgePrompt], new: Tensor) -> dict[str, Tensor]:
    """Of each prompt and layer: the project's score, a causal one, and the gradient's length."""
    nothing = b.nothing(len(prompts))
    n_layers = nothing.shape[1]
    results = [attribute(b.bridge, each.text, target=each.answer, top=1) for each in prompts]
    increase = torch.stack([result.layer_scores.ffn for result in results])
    before = left_without(b.model, b.tokenizer, prompts, nothing).probability
    zeroing = torch.zeros(len(prompts), n_layers)
    gradient = torch.zeros(len(prompts), n_layers)
    for layer in range(n_layers):
        without = nothing.clone()
        without[:, layer] = True
        left = left_without(b.model, b.tokenizer, prompts, without).probability
        zeroing[:, layer] = before.log() - left.log()
        for group in prompt_groups(b.tokenizer, prompts):
            no_edit = torch.zeros(len(group.tokens), *output_weight(b.model, layer).shape)
            found = answer_gradient(b.model, layer, group.tokens, new[group.rows], no_edit)
            gradient[group.rows, layer] = found.flatten(1).norm(dim=1)
    return {"increase": increase, "zeroing": zeroing, "gradient": gradient}


def _outcomes(
    b: Bundled, prompts: Sequence[KnowledgePrompt], new: Tensor, probes: Probes, radius: float
) -> dict[str, Tensor]:
    """Mean probability looked for, of each outcome, by prompt and layer edited."""
    n_layers = b.model.config.n_layer
    weights = [output_weight(b.model, layer) for layer in range(n_layers)]
    length = radius * float(torch.stack([weight.norm() for weight in weights]).mean())
    found = {name: torch.zeros(len(prompts), n_layers) for name in OUTCOMES}
    for layer, weight in enumerate(weights):
        edits = torch.zeros(len(prompts), *weight.shape)
        for group in prompt_groups(b.tokenizer, prompts):
            edits[group.rows] = fit_edits(
                b.model, layer, group.tokens, new[group.rows], length=length
            )
        chances = probabilities_with(
            b.model, b.tokenizer, layer, edits, probes.prompts, probes.owners, probes.answers
        )
        for name, values in found.items():
            some = torch.tensor([outcome == name for outcome in probes.outcomes])
            sums = torch.zeros(2, len(prompts))
            sums[0].index_add_(0, probes.owners[some], chances[some])
            sums[1].index_add_(0, probes.owners[some], torch.ones(int(some.sum())))
            values[:, layer] = sums[0] / sums[1]
    return found


def _explained(outcome: Tensor, scores: dict[str, Tensor]) -> dict[str, Any]:
    """R^2 of each score alone, of the layer alone, and what the score adds to the layer."""
    layer = explained(outcome, [], by_layer=True)
    found: dict[str, Any] = {"layer": round(layer, 4)}
    for name, values in scores.items():
        alone = explained(outcome, [values], by_layer=False)

        def added(weights: Tensor, values: Tensor = values) -> Tensor:
            return torch.tensor(
                [
                    explained(outcome, [values], by_layer=True, weights=draw)
                    - explained(outcome, [], by_layer=True, weights=draw)
                    for draw in weights
                ],
                dtype=torch.float64,
            )

        found[name] = {
            "alone": round(alone, 4),
            "added": _ends(interval(len(outcome), added, resamples=300)),
        }
    return found


def _best_elsewhere(outcome: Tensor) -> Tensor:
    """For each prompt the layer that is best on average over the half it is not in."""
    half = torch.arange(len(outcome)) % 2
    best = torch.stack([outcome[half != which].mean(0).argmax() for which in (0, 1)])
    return best[half]


def layers_table(facts: dict[str, Any], radius: float = RADII[1]) -> str:
    """The page's table of scores and outcomes by layer, as Markdown."""
    n_layers = len(facts["scores"]["increase"])
    lines = [
        "| | " + " | ".join(f"layer {layer}" for layer in range(n_layers)) + " |",
        "|---|" + "---|" * n_layers,
    ]
    outcomes = facts["radii"][str(radius)]["by_layer"]
    rows = [(SCORES[name], facts["scores"][name]) for name in SCORES]
    rows += [(OUTCOMES[name], outcomes[name]) for name in OUTCOMES]
    for name, layers in rows:
        lines.append(f"| {name} | " + " | ".join(_plain(layer[0], 2) for layer in layers) + " |")
    return "\n".join(lines)


def explained_table(facts: dict[str, Any]) -> str:
    """The page's table of variance explained, as Markdown."""
    lines = [
        "| edit up to | score of a layer | R², score alone | R², layer alone | score adds "
        "| rank correlation | without layer 0 |",
        "|---|---|---|---|---|---|---|",
    ]
    for radius, found in facts["radii"].items():
        for name, shown in SCORES.items():
            each = found["explained"]["rewrite"]
            ranks = found["rank_correlation"][name]
            cells = [f"{each[name]['alone']:.3f}", f"{each['layer']:.3f}"]
            cells.append(_with_ends(each[name]["added"], 3))
            cells += [_with_ends(ranks[key], 2) for key in ("all", "after_first")]
            lines.append(f"| {float(radius):.0%} | {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chosen_table(facts: dict[str, Any], radius: float = RADII[1]) -> str:
    """The page's table of ways to choose the layer to edit, as Markdown."""
    found = facts["radii"][str(radius)]
    shown = ("rewrite", "held-out wording", "same relation", "another type")
    lines = [
        "| layer chosen by | " + " | ".join(OUTCOMES[name] for name in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    rows = {"chance": found["any_layer"]} | {
        f"largest {SCORES[name]}" if name in SCORES else name: each
        for name, each in found["chosen"].items()
    }
    for name, each in rows.items():
        cells = [_with_ends(each[outcome], 2) for outcome in shown]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- figures as they are written --------------------------------------------------------------


def _ends(found: Interval) -> list[float]:
    return [round(each, 4) for each in found]


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(each, 4) for each in row] for row in values.tolist()]


def _by_layer(values: Tensor) -> list[list[float]]:
    return [_ends(mean(column)) for column in values.T]


def _plain(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # 0.00 also where it is -0.00


def _with_ends(ends: Sequence[float], digits: int) -> str:
    value, low, high = (_plain(end, digits) for end in ends)
    return f"{value} ({low} to {high})"


def _percent(ends: Sequence[float]) -> str:
    value, low, high = ends
    return f"{value:.0%} ({low:.0%} to {high:.0%})"


def measure() -> dict[str, Any]:
    """All three measurements."""
    b = bundled()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "facts": len(load_facts(trained=True)),
        "known_prompts": len(b.known),
        "self_repair": self_repair(b),
        "wordings": wordings(b),
        "editing": editing(b),
    }


TABLES = {
    "self_repair": (repair_table, compensation_table, repair_nats_table),
    "wordings": (wordings_table, first_table, overlap_table),
    "editing": (layers_table, explained_table, chosen_table),
}


def sentences(facts: dict[str, Any]) -> list[str]:
    """Words of the page that hold figures, as they must read."""
    parts = facts["self_repair"]["parts"]["zero"]
    gives_back = facts["self_repair"]["compensation"]["zero"][6]  # without attention layer 3
    asked = facts["wordings"]
    left = asked["rankings"]["log_prob_increase"]
    edits = facts["editing"]["radii"]["0.1"]
    layer = edits["explained"]["rewrite"]
    by_score = edits["chosen"]["increase"]
    all_prompts = len(knowledge_prompts(trained=True))

    def probability(method: str, kinship: str, top: str = "30") -> str:
        found = asked["rankings"][method][top]["probability"][kinship]
        return f"{found['mean'][0]:.2f}"

    def shared(method: str, kinship: str) -> str:
        return f"{asked['overlap'][method][kinship]['mean'][0] * 100:.0f} %"

    def first(top: str) -> str:
        return f"{left[top]['first']['itself']['mean'][0] * 100:.0f} %"

    singly, together = (
        parts[f"{VALUE_NEURONS} value neurons, FFN, {how}"]["logit"]
        for how in ("one by one", "all at once")
    )
    resampled = facts["self_repair"]["parts"]["resample"]
    resampled = resampled[f"{VALUE_NEURONS} value neurons, FFN, one by one"]["logit"]
    attention = parts[f"{VALUE_NEURONS} value neurons, attention, all at once"]["log_prob"]
    first_layer = parts["attention layer 0"]["logit"]
    same_fact, held_out, reverse, same_wording, same_answer, relation, subject, _ = KINSHIPS
    return [
        f"{facts['facts']:,} facts",
        f"{facts['known_prompts']:,} of the {all_prompts:,} there are",
        f"{facts['self_repair']['prompts']} prompts. Each layer",
        f"give back {gives_back[8]:+.2f} and {gives_back[10]:+.2f}",
        f"another {-gives_back[7]:.2f}, {-gives_back[9]:.2f} and {-gives_back[11]:.2f} away",
        f"direct effect of {first_layer['direct'][0]:.2f} and a total one of "
        f"{first_layer['total'][0]:.2f}",
        f"direct effect of {attention['direct'][0]:.3f} and a total one of "
        f"{attention['total'][0]:.3f}",
        f"lose {singly['direct'][0]:.2f} of logit directly; zeroed singly they cost "
        f"{singly['total'][0]:.2f} in all, zeroed together {together['total'][0]:.2f}",
        f"repaired by {singly['repaired'][0] * 100:.0f} % when zeroed and "
        f"{resampled['repaired'][0] * 100:.0f} % when resampled",
        f"their direct effect is {resampled['direct'][0]:.2f} then in place of "
        f"{singly['direct'][0]:.2f}",
        f"In {parts['attention layer 3']['logit']['prompts_overcorrected'] * 100:.0f} % of the",
        f"has {parts['attention layer 0']['log_prob']['direct'][0]:.3f} nats of it, and the answer "
        f"loses {parts['attention layer 0']['log_prob']['total'][0]:.3f} nats",
        f"(one by one {singly['total'][0]:.2f} of {singly['direct'][0]:.2f})",
        f"({attention['direct'][0]:.3f} nats to {attention['total'][0]:.3f})",
        f"{asked['prompts']} facts, each in one trained wording. ({asked['prompts_left_out']} more",
        f"leave {asked['random'][0]:.2f} of *itself*",
        f"({probability('log_prob_increase', held_out)} left), and the lists share "
        f"{shared('log_prob_increase', same_fact)} or more",
        f"({probability('log_prob_increase', same_wording)} left, "
        f"{shared('log_prob_increase', same_wording)} shared)",
        f"({probability('log_prob_increase', same_answer)}, "
        f"{shared('log_prob_increase', same_answer)})",
        f"falls to {probability('log_prob_increase', relation)}",
        f"({probability('log_prob_increase', reverse)} left; "
        f"{asked['before'][reverse]['prompts']} prompts only",
        f"asked for something else ({probability('log_prob_increase', subject)})",
        f"keeps {probability('gradient_activation', same_answer)} and "
        f"{probability('ablation', same_answer)}",
        f"share {shared('query', subject)} with the same subject asked for something else, where "
        f"value neurons share {shared('log_prob_increase', subject)}",
        f"({probability('query', subject)} left against "
        f"{probability('log_prob_increase', subject)})",
        f"({probability('query', same_wording)} against "
        f"{probability('log_prob_increase', same_wording)})",
        f"still falls to {probability('query', same_answer)}, and the prompt itself only to "
        f"{probability('query', 'itself')}",
        f"falls to {probability('log_prob_increase', 'itself', '10')}, but it stays first in "
        f"{first('10')}",
        f"With 30 it stays first in {first('30')}, with a hundred in {first('100')}",
        f"{facts['editing']['prompts']} facts. Each FFN layer",
        f"layer alone explains {layer['layer']:.3f} of the variance, the score alone "
        f"{layer['increase']['alone']:.3f}, and the score adds {layer['increase']['added'][0]:.3f}",
        f"For the causal score it is {layer['zeroing']['added'][0]:.3f}",
        f"layer 0 in {by_score['layers'][0]} of {facts['editing']['prompts']} prompts, and a "
        f"success of {by_score['rewrite'][0]:.2f}",
        f"correlation falls to {edits['rank_correlation']['increase']['after_first'][0]:.2f}",
        f"({layer['gradient']['added'][0]:.3f} at 10 %",
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    # numbers that name things become texts, as they are when read back
    measured = json.loads(json.dumps(measure()))
    (PAGES / "critics.json").write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    for part, tables in TABLES.items():
        for table in tables:
            print(table(measured[part]), end="\n\n")
