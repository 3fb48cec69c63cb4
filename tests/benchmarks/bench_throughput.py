"""Prompts a second: one ``attribute`` call a prompt beside ``attribute_all``, in one process.

    python tests/benchmarks/bench_throughput.py            # two minutes; a quiet machine

On the bundled model, the same prompts and settings; the two are timed in turn, and the medians of
the rounds are compared. Prints a table.
"""

import random
import statistics
import time

import torch

from tl_neuron_attr import (
    Prompt,
    attribute,
    attribute_all,
    known_prompts,
    load_model,
    paper_prompts,
)

TOPS = (10, 30, 100, 300)
BATCH_SIZES = (8, 32, 64, 128)
PROMPTS = 256
SINGLE = 32
"""How many of them are attributed one by one."""
ROUNDS = 5


def seconds_a_prompt(run, count: int) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) / count


def main() -> None:
    model = load_model("tiny-facts")
    some = random.Random(0).sample(paper_prompts(), 4 * PROMPTS)
    known = known_prompts(model, some).kept
    prompts = [Prompt(text=each.prompt.text, target=each.prompt.answer) for each in known[:PROMPTS]]
    print(f"{torch.get_num_threads()} threads, {PROMPTS} prompts")
    print("top   batch size   one call, ms   batched, ms   times as fast")
    for top in TOPS:
        for batch_size in BATCH_SIZES:

            def singly(top: int = top) -> None:
                for prompt in prompts[:SINGLE]:
                    attribute(model, prompt, top=top)

            def together(top: int = top, batch_size: int = batch_size) -> None:
                attribute_all(model, prompts, top=top, batch_size=batch_size)

            rounds = [
                (seconds_a_prompt(singly, SINGLE), seconds_a_prompt(together, PROMPTS))
                for _ in range(ROUNDS)
            ]
            one, batched = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
            faster = one / batched
            print(f"{top:>3}   {batch_size:>10}   {one:>12.2f}   {batched:>11.2f}   {faster:.2f}")


if __name__ == "__main__":
    main()
