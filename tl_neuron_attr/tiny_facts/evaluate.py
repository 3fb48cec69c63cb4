"""Measures a model on the facts: ``python -m tl_neuron_attr.tiny_facts.evaluate [--model DIR]``.

Two questions: does it know the facts, in the wordings it was trained on and in others, and does
the knowledge sit in few neurons, so that zeroing those takes the answer away.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer, GPT2LMHeadModel

from tl_neuron_attr.models import load_model
from tl_neuron_attr.tiny_facts import tiny_facts_dir
from tl_neuron_attr.tiny_facts.accuracy import Accuracy, accuracies
from tl_neuron_attr.tiny_facts.zeroing import ZEROED, Zeroing, zeroing_effects


def _tables(known: Sequence[Accuracy], effects: Sequence[Zeroing]) -> str:
    lines = [
        "Top-1 accuracy",
        f"{'':10}{'trained':>10}{'prompts':>9}{'held out':>10}{'prompts':>9}",
    ]
    lines += [
        f"{a.knowledge_type:10}{a.trained:>10.2%}{a.trained_prompts:>9}"
        f"{a.held_out:>10.2%}{a.held_out_prompts:>9}"
        for a in known
    ]
    kinds = ("top", "random", "foreign")
    heads = "".join(f"{f'{kind} {n}':>12}" for n in ZEROED for kind in kinds)
    lines += [
        "",
        "The answer's mean probability with FFN neurons zeroed at all positions: its own value",
        "neurons (top), as many random ones of the same layers, another type's value neurons",
        f"{'':10}{'prompts':>8}{'original':>10}{heads}",
    ]
    for e in effects:
        cells = "".join(f"{getattr(e, kind)[n]:>12.3f}" for n in ZEROED for kind in kinds)
        lines.append(f"{e.knowledge_type:10}{e.prompts:>8}{e.original:>10.3f}{cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: two tables, or the same numbers as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tl_neuron_attr.tiny_facts.evaluate",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--model", type=Path, default=tiny_facts_dir(), help="a model's folder")
    parser.add_argument("--prompts-per-type", type=int, default=60, help="for the zeroing")
    parser.add_argument("--seed", type=int, default=0, help="draws prompts and random neurons")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    model = GPT2LMHeadModel.from_pretrained(options.model, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    known = accuracies(model, tokenizer)
    effects = zeroing_effects(
        model,
        load_model(str(options.model), device="cpu"),
        tokenizer,
        prompts_per_type=options.prompts_per_type,
        seed=options.seed,
    )
    if options.json:
        report = {"accuracy": [asdict(a) for a in known], "zeroing": [asdict(e) for e in effects]}
        print(json.dumps(report, indent=2))
    else:
        print(_tables(known, effects))


if __name__ == "__main__":
    main()
