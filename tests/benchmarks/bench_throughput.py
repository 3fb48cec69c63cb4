"""Prompts a second: one ``attribute`` call a prompt beside ``attribute_all``, in one process.

    python tests/benchmarks/bench_throughput.py                   # tiny-facts; three minutes
    python tests/benchmarks/bench_throughput.py gpt2-small-shape  # random weights; five minutes

The same prompts, targets and settings; both are timed in turn, and the fastest of the rounds are
compared: what else the machine does only makes rounds slower. Prints a table.
"""

import random
import sys
import time
import warnings

import torch
from bench_engine import MODELS

from tl_neuron_attr import Prompt, attribute, attribute_all, known_prompts, paper_prompts

ROUNDS = 4


def known(model, count):
    """Prompts of tiny-facts that it answers."""
    some = random.Random(0).sample(paper_prompts(), 4 * count)
    kept = known_prompts(model, some).kept[:count]
    # in order of length, as a shard runs them
    kept = sorted(kept, key=lambda each: len(each.prompt.text))
    return [Prompt(text=each.prompt.text, target=each.prompt.answer) for each in kept]


def of_16_tokens(model, count):
    """Random tokens, as many as a fact's prompt has."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50_000, (count, 17), generator=generator).tolist()
    return [Prompt(tokens=tuple(each[:16]), target=each[16]) for each in ids]


CASES = {
    # prompts, how many of them one by one, tops, batch sizes
    "tiny-facts": (known, 256, 32, (10, 30, 100, 300), (1, 8, 32, 64, 128)),
    "gpt2-small-shape": (of_16_tokens, 64, 4, (300,), (1, 8, 64)),
}


def seconds_a_prompt(run, count: int) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) / count


def main(name: str) -> None:
    warnings.simplefilter("ignore")
    some_prompts, count, single, tops, batch_sizes = CASES[name]
    model = MODELS[name]()
    prompts = some_prompts(model, count)
    print(f"{name}, {torch.get_num_threads()} threads, {len(prompts)} prompts")
    print("top   batch size   one call, ms   batched, ms   prompts/s   times as fast")
    for top in tops:
        for batch_size in batch_sizes:

            def singly(top: int = top) -> None:
                for prompt in prompts[:single]:
                    attribute(model, prompt, top=top)

            def together(top: int = top, batch_size: int = batch_size) -> None:
                # as a run does it: one batch after the other, none kept
                for first in range(0, len(prompts), batch_size):
                    some = prompts[first : first + batch_size]
                    attribute_all(model, some, top=top, batch_size=batch_size)

            rounds = [
                (seconds_a_prompt(singly, single), seconds_a_prompt(together, len(prompts)))
                for _ in range(ROUNDS if name == "tiny-facts" else 2)
            ]
            one, batched = (1e3 * min(times) for times in zip(*rounds, strict=True))
            print(
                f"{top:>3}   {batch_size:>10}   {one:>12.2f}   {batched:>11.2f}   "
                f"{1e3 / batched:>9.1f}   {one / batched:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "tiny-facts")
