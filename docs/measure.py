"""What one attribution costs, on random weights of GPT-2-small's shape: python docs/measure.py

The numbers on the page "Limits and memory" come from this. Random weights give flat predictions,
so the number of neurons scored says nothing about trained models.
"""

import resource
import sys
import time
import warnings

import torch
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_neuron_attr import attribute, capture, neuron_scores, open_host, tokenize
from tl_neuron_attr.prompts import Prompt

POSITIONS = 16


def peak_mib():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def seconds(job, repeats=3):
    """The fastest of a few runs."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        job()
        best = min(best, time.perf_counter() - started)
    return best


def main():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_ctx=1024)
    hf = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_bridge_from_module(
            hf, "GPT2LMHeadModel", hf_config=config, dtype=torch.float32, device="cpu"
        ).eval()
    tokens = torch.randint(config.vocab_size, (POSITIONS,)).tolist()
    found = attribute(model, tokens, top=300)  # the self-check runs here, once
    before = peak_mib()
    host = open_host(model)
    prompt = tokenize(host, Prompt(tokens=tuple(tokens)))
    print(f"capture (one forward pass)   {seconds(lambda: capture(host, prompt)):8.2f} s")
    print(f"attribute, top 300 of each   {seconds(lambda: attribute(model, tokens)):8.2f} s")
    print(f"peak memory up to here       {before:8.0f} MiB")
    with torch.no_grad():
        dense = seconds(lambda: neuron_scores(found.ffns[0], found.out, found.target), 1)
    print(f"every FFN neuron of a layer  {dense:8.2f} s, times {host.n_layers} layers")
    for ranked in (found.ffn_neurons, found.attn_neurons):
        print(f"{ranked.kind}: {ranked.certificate}")


if __name__ == "__main__":
    main()
