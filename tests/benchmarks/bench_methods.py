"""What each method costs, and how close it comes to exact ablation: the tables of the docs page.

    python tests/benchmarks/bench_methods.py cost        # half a minute
    python tests/benchmarks/bench_methods.py closeness   # a minute
    python tests/benchmarks/bench_methods.py             # what the page should say

Cost is of FFN neurons, in plain forward passes of the same prompt: processor time of one thread,
the two measured in turn, each the least of several. Closeness is on tiny-facts, over prompts of all
six types. Both are kept in ``docs/pages/methods.json``.
"""

import json
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tl_neuron_attr import Case, InputError, Prompt, attribute, load_model, open_host, tokenize
from tl_neuron_attr.knowledge import KNOWLEDGE_TYPES, knowledge_prompts
from tl_neuron_attr.methods import LETTERS, METHODS, example_cases, method_name
from tl_neuron_attr.methods.gradients import integrated_gradients
from tl_neuron_attr.methods.together import query, value_and_query

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "methods.json"
TOP = 10
# a read-out of every neuron, or a run: minutes at GPT-2-small's shape
LONG = ("rank", "coefficient_rank", "integrated_gradients", "ablation")
# of every neuron a read-out: likewise
READ_OUTS = ("log_prob_increase", "log_prob", "prob_increase", "value_and_query")
PROMPTS_PER_TYPE = 3
VARIANTS = (
    *METHODS.values(),
    partial(integrated_gradients, positions="all"),
    partial(integrated_gradients, positions="all", quantity="log_prob"),
    partial(query, of="both"),
    *(
        partial(value_and_query, of=of, top_values=count)
        for of, count in (
            ("attn", 30),
            ("ffn", 30),
            ("both", 100),
            ("both", 300),
            ("both", 1000),
        )
    ),
)


def costs(case: Case, names) -> dict[str, dict[str, float]]:
    """Forward passes' time of each method, for the ``TOP`` best and for every neuron."""
    model = case.result.host.model
    tokens = torch.tensor([case.result.captured.prompt.tokens])

    def seconds(run) -> float:
        started = time.process_time()
        run()
        return time.process_time() - started

    def forward() -> None:
        with torch.no_grad():
            model(tokens)

    found = {}
    for name in names:
        for what, top in (("top", TOP), ("every", None)):
            if top is None and case.result.host.d_vocab > 10_000 and name in READ_OUTS:
                continue

            def run(method=METHODS[name], top=top):
                return method(replace(case), "ffn", top)  # anew: a case keeps its ranks

            times = [(seconds(forward), seconds(run))]
            repeats = max(1, min(20, int(1.5 / times[0][1])))
            times += [(seconds(forward), seconds(run)) for _ in range(repeats)]
            ratio = min(own for _, own in times) / min(plain for plain, _ in times)
            found.setdefault(name, {})[what] = round(ratio, 2)
    return found


def gpt2_small_case() -> Case:
    """GPT-2-small's shape, seeded random weights, 16 tokens."""
    from bench_engine import MODELS

    model = MODELS["gpt2-small-shape"]()
    generator = torch.Generator().manual_seed(16)
    tokens, other = torch.randint(0, 50_000, (2, 16), generator=generator).tolist()
    corrupted = tokenize(open_host(model), Prompt(tokens=tuple(other)))
    return Case(result=attribute(model, tuple(tokens)), corrupted=corrupted)


def tiny_facts_case() -> Case:
    """The bundled model, six tokens."""
    (case, _) = example_cases()
    result = attribute(case.result.host.model, case.result.captured.prompt.text, target=" Paris")
    return Case(result=result, corrupted=case.corrupted)


def closeness() -> dict[str, dict[str, float]]:
    """Agreement with exact ablation, means over prompts: ranks, and how many of the 30 best."""
    model = load_model()
    host = open_host(model)
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, dict[str, list[float]]] = {}
    for knowledge_type in KNOWLEDGE_TYPES:
        prompts = knowledge_prompts(knowledge_type, held_out=False, trained=True)
        order = torch.randperm(len(prompts), generator=generator)
        asked = [prompts[i] for i in order[:PROMPTS_PER_TYPE].tolist()]
        others = [prompts[i] for i in order[PROMPTS_PER_TYPE:].tolist()]
        for prompt in asked:
            result = attribute(model, prompt.text, target=prompt.answer)
            case = Case(result=result, corrupted=_corrupted(host, result, prompt, others))
            for kind in ("ffn", "attn"):
                truth = METHODS["ablation"](case, kind, None).flatten()
                for method in VARIANTS:
                    if method is METHODS["ablation"]:
                        continue
                    try:
                        scores = method(case, kind, None).flatten()
                    except InputError:
                        continue
                    row = rows.setdefault(method_name(method), {})
                    row.setdefault(f"{kind} rank", []).append(_rank_correlation(scores, truth))
                    row.setdefault(f"{kind} best", []).append(_shared(scores, truth, 30))
    return {
        name: {
            **{what: round(statistics.mean(values), 3) for what, values in row.items()},
            "prompts": len(row["ffn rank"]),
        }
        for name, row in rows.items()
    }


def _corrupted(host, result, prompt, others):
    """The first other prompt of the type that is as long and has another answer."""
    for other in others:
        if other.answer != prompt.answer:
            tokenized = tokenize(host, Prompt(text=other.text))
            if len(tokenized.tokens) == len(result.captured.prompt.tokens):
                return tokenized
    return None


def _rank_correlation(one, other) -> float:
    return float(torch.corrcoef(torch.stack([_ranks(one), _ranks(other)]))[0, 1])


def _ranks(scores):
    """From the lowest; of equals, as neurons that are off are, the mean of their places."""
    _, which, count = scores.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[which].double()


def _shared(one, other, count: int) -> float:
    best = [set(each.topk(count).indices.tolist()) for each in (one, other)]
    return len(best[0] & best[1]) / count


def cost_table(facts) -> str:
    """Rows of the page: a method, then its cost on both models."""
    letters = {name: letter for letter, name in LETTERS.items()}
    lines = [
        f"| method | | tiny-facts, top {TOP} | every | GPT-2-small shape, top {TOP} | every |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name in METHODS:
        found = [
            facts["cost"][model].get(name, {}).get(what)
            for model in ("tiny-facts", "gpt2-small-shape")
            for what in ("top", "every")
        ]
        cells = ["–" if cost is None else f"{cost:.2f}" for cost in found]
        lines.append(f"| `{name}` | {letters.get(name, '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def closeness_table(facts) -> str:
    """Rows of the page: a method, and how close it came."""
    lines = [
        "| method | FFN: rank correlation | FFN: of the 30 best | attention: rank correlation "
        "| attention: of the 30 best |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in facts["closeness"].items():
        cells = [
            f"{row['ffn rank']:.2f}",
            f"{row['ffn best']:.0%}",
            f"{row['attn rank']:.2f}",
            f"{row['attn best']:.0%}",
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(what: str | None) -> None:
    torch.set_num_threads(1)
    facts = json.loads(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    if what == "cost":
        short = [name for name in METHODS if name not in LONG]
        facts["cost"] = {
            "tiny-facts": costs(tiny_facts_case(), METHODS),
            "gpt2-small-shape": costs(gpt2_small_case(), short),
        }
    elif what == "closeness":
        facts["closeness"] = closeness()
        facts["prompts"] = PROMPTS_PER_TYPE * len(KNOWLEDGE_TYPES)
    if what:
        PAGE.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if {"cost", "closeness"} <= set(facts):
        print(cost_table(facts), closeness_table(facts), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
