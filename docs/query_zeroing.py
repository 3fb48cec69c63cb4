"""Measure what is left of an answer without its query neurons: python docs/query_zeroing.py

Writes pages/query_zeroing.json and prints the table that the page "Query neurons" shows. Of
``tiny-facts``, on 60 prompts of each knowledge type in trained wordings, drawn with seed 0; on one
CPU core about a minute.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, GPT2LMHeadModel

from tl_neuron_attr.models import load_model
from tl_neuron_attr.tiny_facts import tiny_facts_dir
from tl_neuron_attr.tiny_facts.zeroing import query_neurons, value_neurons, zeroing_effects

ZEROED = (10, 30, 100, 200)
PROMPTS_PER_TYPE = 60
METHODS = {"query": query_neurons, "value": value_neurons}
PAGES = Path(__file__).parent / "pages"


def measure():
    """For query and for value neurons: the answer's mean probability, by how many are zeroed."""
    model = GPT2LMHeadModel.from_pretrained(tiny_facts_dir(), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_facts_dir(), local_files_only=True)
    bridge = load_model("tiny-facts", device="cpu")
    facts = {
        "prompts_per_type": PROMPTS_PER_TYPE,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name, method in METHODS.items():
        without = []

        def choose(bridge, tokens, answer, *, top, method=method, without=without):
            found = method(bridge, tokens, answer, top=top)
            if not found:
                without.append(tokens)
            return found

        effects = zeroing_effects(
            model,
            bridge,
            tokenizer,
            choose=choose,
            zeroed=ZEROED,
            prompts_per_type=PROMPTS_PER_TYPE,
        )
        facts[name] = {
            "prompts_without_any": len(without),
            "effects": [asdict(effect) for effect in effects],
        }
    return facts


def table(facts):
    """The page's table of all prompts, as Markdown."""
    (query, *_), (value, *_) = (facts[name]["effects"] for name in METHODS)
    lines = [
        "| FFN neurons zeroed | query neurons | random, same layers | another type's query neurons "
        "| value neurons |",
        "|---|---|---|---|---|",
        f"| none | {query['original']:.3f} | | | |",
    ]
    for n in map(str, ZEROED):
        cells = (query["top"][n], query["random"][n], query["foreign"][n], value["top"][n])
        lines.append(f"| {n} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def types_table(facts, n="30"):
    """The page's table by knowledge type, as Markdown."""
    lines = ["| | none | query neurons | random, same layers |", "|---|---|---|---|"]
    for effect in facts["query"]["effects"][1:]:
        lines.append(
            f"| {effect['knowledge_type']} | {effect['original']:.3f} | {effect['top'][n]:.3f} "
            f"| {effect['random'][n]:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    # numbers of neurons become texts, as they are when read back
    measured = json.loads(json.dumps(measure()))
    (PAGES / "query_zeroing.json").write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    print(table(measured), types_table(measured), sep="\n\n")
