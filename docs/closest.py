"""Measure which scores come closest to zeroing each neuron: python docs/closest.py

Writes pages/closest.json and prints the tables that the page "Closest to zeroing" shows. Of
``tiny-facts``, on prompts in trained wordings drawn with seed 0, and of the three small models in
``../shared/models`` where they are at hand, on beginnings of texts that they wrote themselves
(closest_texts.json). Everything in float64. Names of models measure those alone, ``--costs`` the
costs alone, which want a quiet machine; ``--tables`` prints what was measured before.
"""

import json
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import transformers
from frozen import CHORDS, HALVES, NORMS, PATTERNS, FrozenModel, few_steps, frozen_gradient
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_neuron_attr import InputError, attribute
from tl_neuron_attr.interventions import ZeroMask, masked_residuals
from tl_neuron_attr.knowledge import KNOWLEDGE_TYPES, knowledge_prompts
from tl_neuron_attr.methods import METHODS, Case
from tl_neuron_attr.methods.curved import curved_gradient
from tl_neuron_attr.methods.together import value_and_query
from tl_neuron_attr.models import load_model
from tl_neuron_attr.readout import read_out
from tl_neuron_attr.tiny_facts import tiny_facts_dir

KINDS = ("ffn", "attn")
TOPS = (10, 30, 100, 300)
PROMPTS = {"tiny-facts": 60, "slm4096": 60, "babyllama105": 24, "stories260K": 60}
"""How many; babyllama105 sees single characters, so that its prompts are long."""
KNOWN = (0.3, 0.999)
"""What probability the answer has at least, and, of models on their own texts, at most."""
HERE = Path(__file__).parent
FIGURES = HERE / "pages" / "closest.json"
SHARED = HERE.parents[1] / "shared" / "models"
DIRECTORIES = {
    "tiny-facts": tiny_facts_dir(),
    **{name: SHARED / name for name in ("slm4096", "babyllama105", "stories260K")},
}

SHIPPED = {
    "no backward pass": (
        "log_prob_increase",
        "direct_logit",
        "query",
        "value_and_query",
        "carried_once",
    ),
    "a sweep backwards by hand": ("carried_back",),
    "one backward pass": ("gradient_activation", "curved_gradient"),
}
"""By what they need; ``carried_back`` no autograd."""

SCORES = {**METHODS, "value_and_query": partial(value_and_query, top_values=100)}
"""More value neurons than by default, as more can only bring it closer."""

TRIED = {
    "one step, first order": partial(few_steps, steps=1),
    "one step, patterns and norms frozen": partial(few_steps, steps=1, frozen=(PATTERNS, NORMS)),
    "two steps, first order": partial(few_steps, steps=2),
    "four steps, first order": partial(few_steps, steps=4),
    "gradient, norms frozen": partial(frozen_gradient, frozen=(NORMS,)),
    "gradient, patterns frozen": partial(frozen_gradient, frozen=(PATTERNS,)),
    "gradient, both frozen": partial(frozen_gradient, frozen=(NORMS, PATTERNS)),
    "gradient, chords": partial(frozen_gradient, frozen=(CHORDS,)),
    "gradient, both frozen, chords in halves": partial(
        frozen_gradient, frozen=(NORMS, PATTERNS, CHORDS, HALVES)
    ),
    "gradient, FFN scaled by 0.9": partial(frozen_gradient, scale=0.9),
    "gradient, temperature 2": partial(frozen_gradient, temperature=2.0),
}
"""What else was tried, of ``frozen.py``."""


def prompts_of(name, model):
    """(tokens, answer) of each prompt."""
    generator = torch.Generator().manual_seed(0)
    if name == "tiny-facts":
        return [
            asked
            for knowledge_type in KNOWLEDGE_TYPES
            for asked in _facts(model, knowledge_type, generator)
        ]
    found = []
    for text in json.loads((HERE / "closest_texts.json").read_text("utf-8"))[name]:
        # the vocabulary of slm4096 lacks the BOS token that its tokenizer would add
        ids = model.to_tokens(text, prepend_bos=name != "slm4096")[0].tolist()
        with torch.no_grad():
            chances, best = model(torch.tensor([ids]))[0].softmax(-1).max(-1)
        found += [
            (tuple(ids[: place + 1]), int(best[place]))
            for place in range(3, len(ids) - 1)
            if KNOWN[0] <= chances[place] <= KNOWN[1]
        ]
    chosen = torch.randperm(len(found), generator=generator)[: PROMPTS[name]]
    return [found[place] for place in chosen.tolist()]


def _facts(model, knowledge_type, generator):
    """So many prompts of a type, whose answer is a token and known."""
    asked = knowledge_prompts(knowledge_type, held_out=False, trained=True)
    found = []
    for place in torch.randperm(len(asked), generator=generator).tolist():
        answer = model.tokenizer(asked[place].answer, add_special_tokens=False)["input_ids"]
        tokens = model.to_tokens(asked[place].text)[0]
        with torch.no_grad():
            chance = model(tokens[None])[0, -1].softmax(-1)[answer[0]]
        if len(answer) == 1 and chance >= KNOWN[0]:
            found.append((tuple(tokens.tolist()), answer[0]))
        if len(found) == PROMPTS["tiny-facts"] // len(KNOWLEDGE_TYPES):
            return found
    raise RuntimeError(f"{knowledge_type}: only {len(found)} prompts are known")


def scores_of(case, frozen):
    """Every score of one prompt, by kind and name; ablation among them."""
    tokens = torch.tensor(case.result.captured.prompt.tokens)
    names = [name for group in SHIPPED.values() for name in group]
    found = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for name in (*names, "ablation"):
            try:
                found[kind][name] = SCORES[name](case, kind, None).flatten(1)
            except InputError:  # nothing feeds the value neurons
                found[kind][name] = torch.zeros_like(found[kind]["log_prob_increase"])
        found[kind]["curved_gradient, one rival"] = curved_gradient(case, kind, rivals=1).flatten(1)
    for name, score in TRIED.items():
        each = score(frozen, tokens, case.result.target.id)
        for kind in KINDS:
            found[kind][name] = each[kind]
    return found


def closeness(score, exact):
    """How close a score of all neurons is to what zeroing each does."""
    score, exact = score.flatten().double(), exact.flatten().double()
    largest = exact.abs().topk(min(300, len(exact) // 3)).indices
    facts = {
        "rank_correlation": _correlation(_ranks(score), _ranks(exact)),
        "rank_correlation_largest": _correlation(_ranks(score[largest]), _ranks(exact[largest])),
        "correlation": _correlation(score, exact),
    }
    order, wanted = (each.argsort(descending=True, stable=True) for each in (score, exact))
    for top in TOPS:
        shared = set(order[:top].tolist()) & set(wanted[:top].tolist())
        facts[f"overlap_{top}"] = len(shared) / min(top, len(exact))
    return facts


def _ranks(values):
    """From 1; those that tie share the middle of their places."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[which].double()


def _correlation(first, second):
    if first.std() == 0:  # no score at all
        return 0.0
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def left_after(case, kind, scores):
    """The answer's probability with the top neurons by each score zeroed together."""
    result = case.result
    host, prompt = result.host, result.captured.prompt
    masks = []
    for score in scores.values():
        order = score.flatten().argsort(descending=True, stable=True)
        for top in TOPS:
            mask = torch.zeros(score.numel(), dtype=torch.bool)
            mask[order[:top]] = True
            masks.append(mask.view(score.shape))
    shape = (host.d_mlp,) if kind == "ffn" else (host.n_heads, host.d_head)

    def mask_of(row):
        by_layer = {layer: mask.view(shape) for layer, mask in enumerate(masks[row])}
        return ZeroMask(**{"ffn": {}, "attn": {}, "sources": {}, kind: by_layer})

    with torch.no_grad():
        resid = masked_residuals(host, [prompt] * len(masks), mask_of)
        out = read_out(host, resid[0], "recomputed")
        left = out.log_prob(resid, result.target).exp().view(len(scores), len(TOPS))
    return {
        name: {f"left_{top}": float(value) for top, value in zip(TOPS, row, strict=True)}
        for name, row in zip(scores, left, strict=True)
    }


def measure(name, limit=None):
    """Every score's closeness and what is left, averaged over a model's prompts."""
    model = load_model(str(DIRECTORIES[name]), device="cpu", dtype="float64")
    frozen = FrozenModel(DIRECTORIES[name])
    rows = {kind: {} for kind in KINDS}
    before = []
    for tokens, answer in prompts_of(name, model)[:limit]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is ill-conditioned is left out
            case = Case(result=attribute(model, tokens, target=answer, top=100))
            scores = scores_of(case, frozen)
        with torch.no_grad():
            own = frozen.log_prob(frozen.run(torch.tensor(tokens))[2], answer)
        assert abs(float(own) - case.result.log_prob) < 1e-5, (float(own), case.result.log_prob)
        before.append(float(own.exp()))
        for kind in KINDS:
            left = left_after(case, kind, scores[kind])
            for method, score in scores[kind].items():
                facts = closeness(score, scores[kind]["ablation"]) | left[method]
                rows[kind].setdefault(method, []).append(facts)
    facts = {"prompts": len(before), "before": statistics.mean(before)}
    for kind in KINDS:
        facts[kind] = {
            method: {key: round(statistics.mean(row[key] for row in each), 4) for key in each[0]}
            | {
                "rank_correlation_error": round(
                    statistics.stdev(row["rank_correlation"] for row in each) / len(each) ** 0.5, 4
                )
            }
            for method, each in rows[kind].items()
        }
    return facts


# --- what they cost -----------------------------------------------------------------------------


def gpt2_small(n_tokens=64):
    """A random model of GPT-2-small's shape, and a prompt."""
    config = transformers.GPT2Config(attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
        tokens = tuple(torch.randint(50_000, (n_tokens,)).tolist())
    model = build_bridge_from_module(
        hf, "GPT2LMHeadModel", hf_config=config, dtype=torch.float32, device="cpu"
    )
    return model.eval(), tokens


def costs(rounds=7):
    """Each score's CPU time in plain forward passes, in turns in one process, in float32."""
    tiny = load_model("tiny-facts", device="cpu")
    models = {
        "tiny-facts": (tiny, tuple(tiny.to_tokens("The capital of France is")[0].tolist())),
        "GPT-2 small shape, 64 tokens": gpt2_small(),
    }
    facts = {"threads": torch.get_num_threads()}
    for name, (model, tokens) in models.items():
        case = Case(result=attribute(model, tokens, top=30))
        ids = torch.tensor([tokens])

        def forward(model=model, ids=ids):
            with torch.no_grad():
                model(ids)

        calls = {"forward": forward}
        for method in ("carried_once", "carried_back", "gradient_activation", "curved_gradient"):
            calls[method] = partial(METHODS[method], case, "ffn", None)
        calls["curved_gradient, one rival"] = partial(curved_gradient, case, "ffn", rivals=1)
        times = {method: [] for method in calls}
        for _ in range(rounds):
            for method, call in calls.items():
                started = time.process_time()
                call()
                times[method].append(time.process_time() - started)
        median = {method: statistics.median(each) for method, each in times.items()}
        facts[name] = {
            method: round(value / median["forward"], 2) for method, value in median.items()
        } | {"forward_seconds": round(median["forward"], 4)}
    return facts


# --- tables -------------------------------------------------------------------------------------


def names_of():
    """Scores in the order of the tables: what ships by what it costs, what was tried, the truth."""
    shipped = [name for group in SHIPPED.values() for name in group]
    return [*shipped, "curved_gradient, one rival", *TRIED, "ablation"]


def table(facts, kind, cell, names=None):
    """One row a score and one column a model, as Markdown; ``cell`` writes a score's figures."""
    models = [name for name in DIRECTORIES if name in facts]
    heads = [f"{name} ({facts[name]['prompts']})" for name in models]
    lines = [f"| score | {' | '.join(heads)} |", "|---" * (1 + len(models)) + "|"]
    for name in names or names_of():
        shown = f"`{name}`" if name in METHODS else name
        cells = (cell(facts[model][kind][name]) for model in models)
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def close(row):
    """Rank correlation over all neurons, over the largest, and Pearson's."""
    keys = ("rank_correlation", "rank_correlation_largest", "correlation")
    return " / ".join(f"{row[key]:.2f}" for key in keys)


def shared(row):
    """The part of ablation's top neurons that are among as many of the score's."""
    return " / ".join(f"{row[f'overlap_{top}']:.2f}" for top in TOPS)


def left(row):
    """The answer's mean probability without the top neurons."""
    return " / ".join(f"{row[f'left_{top}']:.3f}" for top in TOPS)


def tables(facts):
    """Every table of the page, by what it shows."""
    shipped = [name for name in names_of() if name in METHODS]
    found = {}
    for kind in KINDS:
        found[f"{kind} close"] = table(facts, kind, close)
        found[f"{kind} shared"] = table(facts, kind, shared, shipped)
        found[f"{kind} left"] = table(facts, kind, left, shipped)
    found["cost"] = cost_table(facts["cost"])
    return found


def cost_table(facts):
    """Forward passes' time, one row a score."""
    models = [name for name in facts if isinstance(facts[name], dict)]
    lines = [f"| score | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|"]
    for name in facts[models[0]]:
        if name not in ("forward", "forward_seconds"):
            shown = f"`{name}`" if name in METHODS else name
            lines.append(f"| {shown} | {' | '.join(f'{facts[m][name]:.2f}' for m in models)} |")
    return "\n".join(lines)


def saved():
    """What was measured before."""
    return json.loads(FIGURES.read_text("utf-8")) if FIGURES.exists() else {}


def write(facts):
    """Keep the figures, those of other models and the costs as they were."""
    FIGURES.write_text(json.dumps(saved() | facts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = sys.argv[1:]
    if not asked or set(asked) & set(DIRECTORIES):
        for name in [name for name in DIRECTORIES if name in asked] or DIRECTORIES:
            if not DIRECTORIES[name].exists():
                print(f"{name}: skipped, it is not in {SHARED}")
                continue
            write({name: measure(name)})
    if not asked or "--costs" in asked:
        write({"cost": costs(), "torch": torch.__version__})
    for name, text in tables(saved()).items():
        print(f"\n{name}\n\n{text}")
