"""Measure how time grows with a model and a request, and draw it: python docs/cost.py

Writes pages/cost.json and pages/images/cost-*.svg, which the page "Cost" shows. Needs matplotlib
(extra ``bench``), a quiet machine and some minutes. All points of one plot are measured one after
the other in one process, on random weights of GPT-2's architecture: compare their ratios.
"""

import json
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_neuron_attr import (
    Prompt,
    Target,
    attn_decomposition,
    capture,
    ffn_decomposition,
    open_host,
    read_out,
    tokenize,
)
from tl_neuron_attr.scores import baselines
from tl_neuron_attr.topk import exact_scores, score_bounds, top_neurons_of_runs

BASE = {"d_vocab": 25_000, "d_mlp": 1536, "layers": 6, "tokens": 32, "k": 100}
SWEEPS = {
    "d_vocab": (6_250, 12_500, 25_000, 50_000, 100_000),
    "d_mlp": (768, 1536, 3072, 6144, 12_288),
    "layers": (3, 6, 12, 24),
    "tokens": (8, 32, 128, 512),
    "k": (30, 100, 300, 1000),
}
D_MODEL, HEADS = 384, 6
REPEATS = 3
DENSE_EVERY = 256
"""Dense evaluation is measured on every 256th neuron, and multiplied."""
LINES = {
    "forward": ("plain forward pass", "#777777", ":"),
    "bounds": ("forward, capture and all bounds", "#004488", "--"),
    "certified": ("certified, k of each kind", "#004488", "-"),
    "dense": ("every neuron (extrapolated)", "#BB5566", "-"),
}
PAGES = Path(__file__).parent / "pages"


def random_model(d_vocab, d_mlp, layers, tokens, k):
    """A model of this shape whose predictions are not flat."""
    config = transformers.GPT2Config(
        vocab_size=d_vocab,
        n_embd=D_MODEL,
        n_head=HEADS,
        n_inner=d_mlp,
        n_layer=layers,
        n_positions=max(64, tokens),
    )
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "wte" in name:
                weight.mul_(7)
            if "mlp.c_proj.weight" in name:
                weight.mul_(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_bridge_from_module(
            hf, "GPT2LMHeadModel", hf_config=config, dtype=torch.float32, device="cpu"
        ).eval()


def seconds(job):
    """The median of a few runs, after one to warm up."""
    job()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        job()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(shape):
    """Seconds of each stage, at one shape."""
    model = random_model(**shape)
    host = open_host(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape["d_vocab"], (shape["tokens"],), generator=generator)
    prompt = tokenize(host, Prompt(tokens=ids))

    def prepare():
        captured = capture(host, prompt)
        out = read_out(host, captured.resid_final)
        target = Target(captured.top_predictions(1)[0][0])
        layers = range(host.n_layers)
        ffns = [ffn_decomposition(host, captured, layer) for layer in layers]
        attns = [attn_decomposition(host, captured, layer) for layer in layers]
        return out, ffns, attns, baselines(captured, out, target)

    def bounds():
        out, ffns, attns, before = prepare()
        score_bounds(ffns, out, before.ffn)
        score_bounds(attns, out, before.attn)

    def certified():
        out, ffns, attns, before = prepare()
        top_neurons_of_runs([ffns], out, before.ffn, shape["k"])
        top_neurons_of_runs([attns], out, before.attn, shape["k"])

    def dense():
        out, ffns, attns, before = prepare()
        for blocks, here in ((ffns, before.ffn), (attns, before.attn)):
            total = sum(block.n_neurons for block in blocks)
            exact_scores(blocks, out, here, torch.arange(0, total, DENSE_EVERY))

    with torch.no_grad():
        start = seconds(prepare)
        return {
            "forward": seconds(lambda: model(ids[None])),
            "bounds": seconds(bounds),
            "certified": seconds(certified),
            "dense": start + DENSE_EVERY * max(0.0, seconds(dense) - start),
        }


def draw(name, points):
    """One plot: seconds over one property, both logarithmic."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for line, (label, colour, style) in LINES.items():
        values = [point[line] for point in points]
        axes.plot(
            [point[name] for point in points],
            values,
            style,
            color=colour,
            marker="o",
            markersize=4,
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds")
    axes.set_xticks([point[name] for point in points], [f"{point[name]:,}" for point in points])
    axes.minorticks_off()
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(PAGES / "images" / f"cost-{name}.svg", bbox_inches="tight")
    plt.close(figure)


def main():
    plt.rcParams |= {"svg.hashsalt": "cost", "svg.fonttype": "none", "font.size": 10}
    sweeps = {}
    for name, values in SWEEPS.items():
        sweeps[name] = []
        for value in values:
            shape = BASE | {name: value}
            point = {name: value, **measure(shape)}
            sweeps[name].append(point)
            print(name, {key: round(number, 4) for key, number in point.items()}, flush=True)
        draw(name, sweeps[name])
    facts = {
        "base": BASE | {"d_model": D_MODEL, "heads": HEADS},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "seconds": sweeps,
    }
    (PAGES / "cost.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
