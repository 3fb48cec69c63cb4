"""Memory attribution takes, beside a forward pass and beside a full cache (Linux).

    pytest -o addopts= tests/benchmarks/bench_memory.py -s --benchmark-json=memory.json

Each job runs in a fresh process on GPT-2-small's shape, and reports the highest resident memory
while it ran, above what the loaded model took before. ``extra_info`` has it in MiB.
"""

import multiprocessing
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

JOBS = ("forward", "run_with_cache", "attribute")


def resident(field):
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_of(job, n_tokens, send):
    import torch
    from bench_engine import MODELS

    from tl_neuron_attr import attribute

    model = MODELS["gpt2-small-shape"]()
    attribute(model, [1, 2, 3], top=5)  # libraries load, the identities are checked
    tokens = torch.randint(0, 50_000, (n_tokens,), generator=torch.Generator().manual_seed(0))
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the highest mark starts anew
    before = resident("VmRSS")
    with torch.no_grad():
        if job == "forward":
            model(tokens[None])
        elif job == "run_with_cache":
            model.run_with_cache(tokens[None])
        else:
            attribute(model, tokens)
    send.send(resident("VmHWM") - before)


@pytest.mark.parametrize("n_tokens", [16, 128, 512])
def test_peak_memory(benchmark, n_tokens):
    benchmark.group = f"{n_tokens} tokens"
    context = multiprocessing.get_context("spawn")

    def measure():
        peaks = {}
        for job in JOBS:
            receive, send = context.Pipe()
            process = context.Process(target=peak_of, args=(job, n_tokens, send))
            process.start()
            peaks[job] = round(receive.recv())
            process.join()
        return peaks

    peaks = benchmark.pedantic(measure, rounds=1, iterations=1)
    benchmark.extra_info.update({f"{job}, MiB": peak for job, peak in peaks.items()})
    print(f"\n{n_tokens} tokens, MiB above the model: {peaks}")
