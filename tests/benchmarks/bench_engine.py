"""How long attribution takes, beside a plain forward pass and beside what else there is.

    pytest -o addopts= tests/benchmarks/bench_engine.py --benchmark-json=engine.json
    pytest -o addopts= tests/benchmarks/bench_engine.py -k "small and 16"    # one model, one length

(``addopts`` are the tests' runtime type checks, which users do not pay for.)

Every row of a group is measured in the same process on the same model and prompt, each round
beside a plain forward pass: quote the ratios (``forward passes`` in the extra info), not the
seconds. GPT-2-small's shape has seeded random weights, scaled so that predictions
are not flat; on a CUDA device Llama-7B's shape in bfloat16 is measured too. ``dense`` scores every
neuron by its definition; at GPT-2-small's shape that takes minutes, so it is measured at 16 tokens
on every 16th neuron and reported for all of them (``extrapolated`` in its extra info).
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import statistics
import tempfile
import time
from pathlib import Path

import pytest
import torch
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_neuron_attr import (
    Prompt,
    Target,
    attn_decomposition,
    attribute_all,
    capture,
    capture_sources,
    ffn_decomposition,
    head_scan,
    load_model,
    open_host,
    projection_index,
    query_scores,
    read_out,
    score_intervals,
    tokenize,
)
from tl_neuron_attr.knowledge import knowledge_prompts
from tl_neuron_attr.reading import readings, where_set_off
from tl_neuron_attr.scores import baselines
from tl_neuron_attr.topk import exact_scores, score_bounds, top_neurons_of_runs

SHARED = Path(__file__).parents[3] / "shared" / "models"
INDICES = Path(tempfile.gettempdir()) / "tl_neuron_attr-bench-indices"
TOP = 300


def random_model(class_name, config, *, dtype, device):
    """A seeded random model of a known shape.

    What its tokens and FFNs say is widened until the last layer's predictions are about as sharp
    as a trained model's (at GPT-2-small's shape a perplexity of some hundreds and a largest
    probability of .1; as initialised, all tokens are about equally likely).
    """
    config._attn_implementation = "eager"
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        hf = getattr(transformers, class_name)._from_config(
            config, attn_implementation="eager", dtype=dtype
        )
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if any(part in name for part in ("wte", "lm_head")):
                weight.mul_(7)
            if any(part in name for part in ("mlp.c_proj.weight", "down_proj")):
                weight.mul_(10)
    return build_bridge_from_module(
        hf.eval(), class_name, hf_config=config, dtype=dtype, device=device
    ).eval()


MODELS = {
    "gpt2-small-shape": lambda: random_model(
        "GPT2LMHeadModel", transformers.GPT2Config(), dtype=torch.float32, device="cpu"
    ),
    "tiny-facts": lambda: load_model("tiny-facts"),
    **{
        path.name: lambda path=path: load_model(str(path))
        for path in sorted(SHARED.glob("*"))
        if (path / "config.json").exists()
    },
}
if torch.cuda.is_available():
    MODELS["llama-7b-shape"] = lambda: random_model(
        "LlamaForCausalLM",
        transformers.LlamaConfig(),
        dtype=torch.bfloat16,
        device="cuda",
    )


class Case:
    """One model and one prompt, with everything an engine starts from."""

    def __init__(self, model, n_tokens):
        self.model = model
        self.host = open_host(model)
        if n_tokens > self.host.n_ctx:
            pytest.skip(f"longer than the context of {self.host.n_ctx}")
        generator = torch.Generator().manual_seed(n_tokens)
        ids = torch.randint(0, min(self.host.d_vocab, 50_000), (n_tokens,), generator=generator)
        self.tokens = ids[None].to(self.host.device)
        self.prompt = tokenize(self.host, Prompt(tokens=tuple(ids.tolist())))
        with torch.no_grad():
            self.prepare()

    def prepare(self):
        """The forward pass with capture, and what the scores are computed from."""
        self.captured = capture(self.host, self.prompt)
        self.out = read_out(self.host, self.captured.resid_final)
        self.target = Target(self.captured.top_predictions(1)[0][0])
        layers = range(self.host.n_layers)
        self.blocks = {
            "ffn": [ffn_decomposition(self.host, self.captured, layer) for layer in layers],
            "attn": [attn_decomposition(self.host, self.captured, layer) for layer in layers],
        }

    def forward(self):
        self.model(self.tokens)

    def bounds(self):
        self.prepare()
        before = baselines(self.captured, self.out, self.target)
        score_bounds(self.blocks["ffn"], self.out, before.ffn)
        score_bounds(self.blocks["attn"], self.out, before.attn)

    def certified(self):
        self.prepare()
        before = baselines(self.captured, self.out, self.target)
        return [
            top_neurons_of_runs([blocks], self.out, getattr(before, kind), TOP)[0]
            for kind, blocks in self.blocks.items()
        ]

    def floor(self, best):
        """What no exact method can go below: the forward pass, and the listed neurons' scores."""
        self.model(self.tokens)
        before = baselines(self.captured, self.out, self.target)
        for (kind, blocks), flat in zip(self.blocks.items(), best, strict=True):
            exact_scores(blocks, self.out, getattr(before, kind), flat)

    def intervals(self, index):
        before = baselines(self.captured, self.out, self.target)
        return {
            kind: score_intervals(blocks, self.out, self.target, index, before=here)
            for (kind, blocks), here in zip(
                self.blocks.items(), (before.ffn, before.attn), strict=True
            )
        }

    def values(self):
        """The 30 best value neurons of each kind, and what happened where they are set off."""
        best = [found.first(30) for found in self.certified()]
        return best, self.sources(best)

    def sources(self, best):
        return capture_sources(self.host, self.captured, best[1].source_pos.tolist())

    def query(self, best, sources):
        """Query scores of every layer, head and FFN neuron."""
        return query_scores(self.host, self.captured, best, sources)

    def query_by_definition(self, scores, every):
        """The same for every so many FFN neurons, one by one: its share of each value neuron."""
        placed = where_set_off(self.captured, scores.values)
        rows = readings(self.host, scores.sources, placed, "exact", None)
        weight = scores.inputs.weight
        for layer in range(scores.ffn_depth):
            earlier = (rows.layer > layer).nonzero()[:, 0].tolist()
            for index in range(0, self.host.d_mlp, every):
                subvalue, score = self.host.W_out(layer)[index], 0.0
                for row in earlier:
                    m = scores.sources.mlp_post[layer, rows.place[row], index]
                    score = score + weight[row] * (m * subvalue @ rows.key[row])

    def dense(self, every):
        before = baselines(self.captured, self.out, self.target)
        for kind, blocks in self.blocks.items():
            total = sum(block.n_neurons for block in blocks)
            flat = torch.arange(0, total, every, device=self.host.device)
            exact_scores(blocks, self.out, getattr(before, kind), flat)

    def stack_neuron_results(self):
        """TransformerLens's own: frozen-norm logits of every FFN neuron."""
        _, cache = self.model.run_with_cache(self.tokens)
        results = cache.stack_neuron_results(layer=-1, pos_slice=-1)
        return cache.logit_attrs(results, tokens=self.target.id, pos_slice=-1)

    def gradient_x_activation(self):
        """Of every FFN neuron at every position, by one backward pass."""
        posts = {}

        def keep(value, hook):
            value.retain_grad()
            posts[hook.name] = value

        names = [f"blocks.{layer}.mlp.hook_post" for layer in range(self.host.n_layers)]
        with torch.enable_grad():
            logits = self.model.run_with_hooks(
                self.tokens, fwd_hooks=[(name, keep) for name in names]
            )
            logits[0, -1].log_softmax(-1)[self.target.id].backward()
        self.model.zero_grad()
        return [value.grad * value for value in posts.values()]

    def integrated_gradients(self, steps=20):
        """Of every FFN neuron, along its layer's activation scaled from 0: steps x layers runs."""
        for layer in range(self.host.n_layers):
            name = f"blocks.{layer}.mlp.hook_post"
            for step in range(1, steps + 1):

                def scale(value, hook, share=step / steps):
                    scaled = (value * share).detach().requires_grad_()
                    scaled.retain_grad()
                    return scaled

                with torch.enable_grad():
                    logits = self.model.run_with_hooks(self.tokens, fwd_hooks=[(name, scale)])
                    logits[0, -1].log_softmax(-1)[self.target.id].backward()
        self.model.zero_grad()


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return MODELS[request.param]()


TRAINED = [name for name in MODELS if "shape" not in name]


@pytest.mark.parametrize("name", TRAINED)
def test_exact_evaluations_for_the_best_100_on_knowledge_prompts(name, benchmark):
    model = MODELS[name]()
    texts = [prompt.text for prompt in knowledge_prompts(trained=True)][::50]
    bos_id = model.tokenizer.bos_token_id
    bos = None if bos_id is not None and bos_id < model.cfg.d_vocab else False
    benchmark.group = f"{name}, {len(texts)} knowledge prompts"
    found = benchmark.pedantic(
        lambda: attribute_all(model, texts, prepend_bos=bos, top=100), rounds=1
    )
    for kind in ("ffn", "attn"):
        certificates = [getattr(result, f"{kind}_neurons").certificate for result in found]
        assert all(certificate.holds for certificate in certificates)
        evaluated = sorted(certificate.evaluated for certificate in certificates)
        total = {certificate.total for certificate in certificates}
        benchmark.extra_info[kind] = (
            f"median {statistics.median(evaluated)}, most {evaluated[-1]} of {max(total)} scored"
        )


@pytest.fixture(scope="module", params=[16, 128, 512])
def case(request, model):
    return Case(model, request.param)


@pytest.fixture
def measure(case, benchmark, request):
    """Times a function, and a plain forward pass before each round: quote the median ratio."""

    def run(function, *, rounds=5, enabled_grad=False):
        benchmark.group = request.node.callspec.id
        beside = []

        def forward():
            with torch.no_grad():
                wait()
                started = time.perf_counter()
                case.forward()
                wait()
                beside.append(time.perf_counter() - started)

        def timed():
            found = function()
            wait()
            return found

        with torch.set_grad_enabled(enabled_grad):
            found = benchmark.pedantic(timed, setup=forward, rounds=rounds, warmup_rounds=1)
        ratios = [
            taken / plain
            for taken, plain in zip(benchmark.stats.stats.data, beside[-rounds:], strict=True)
        ]
        benchmark.extra_info["forward passes"] = round(
            statistics.median(ratios) * benchmark.extra_info.get("extrapolated", 1), 2
        )
        return found

    return run


def wait():
    """A GPU is done with what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def test_forward(case, measure):
    measure(case.forward, rounds=25)


def test_forward_with_capture(case, measure):
    measure(case.prepare, rounds=25)


def test_capture_and_bounds_of_all_neurons(case, measure):
    measure(case.bounds, rounds=25)


def test_certified_top_300_of_each_kind(case, measure, benchmark):
    ranked = measure(case.certified)
    for found in ranked:
        certificate = found.certificate
        assert certificate.holds
        benchmark.extra_info[found.kind] = f"{certificate.evaluated} of {certificate.total} scored"


def test_forward_and_exact_scores_of_just_those(case, measure):
    best = []
    for blocks, ranked in zip(case.blocks.values(), case.certified(), strict=True):
        first = blocks[0].layer
        best.append((ranked.layer - first) * blocks[0].n_neurons + ranked.number)
    measure(lambda: case.floor(best))


def test_query_scores_of_30_value_neurons_of_each_kind(case, measure):
    best, sources = case.values()
    measure(lambda: case.query(best, sources))


def test_the_second_forward_pass_for_query_scores(case, measure):
    best = case.values()[0]
    measure(lambda: case.sources(best))


def test_query_scores_neuron_by_neuron(case, measure, benchmark):
    if case.tokens.shape[1] > 16:
        pytest.skip("minutes; measured at 16 tokens")
    every = max(1, case.host.d_mlp // 24)
    scores = case.query(*case.values())
    benchmark.extra_info["extrapolated"] = every
    measure(lambda: case.query_by_definition(scores, every), rounds=1)


def test_scan_of_all_heads(case, measure):
    if case.tokens.shape[1] > 16:
        pytest.skip("measured at 16 tokens")
    measure(lambda: head_scan(case.host, case.captured, case.target))


def test_dense_exact(case, measure, benchmark):
    total = sum(block.n_neurons for blocks in case.blocks.values() for block in blocks)
    if total * case.host.d_vocab * case.host.d_model > 2e13:
        pytest.skip("hours: the certified engine is there for this")
    every = 16 if total * case.host.d_vocab * case.host.d_model > 1e12 else 1
    benchmark.extra_info["extrapolated"] = every
    measure(lambda: case.dense(every), rounds=2)


def test_every_neuron_within_a_thousandth_of_a_nat(case, measure, benchmark):
    index = projection_index(case.host, INDICES)  # made once per model, and not measured
    found = measure(lambda: case.intervals(index), rounds=3)
    for kind, intervals in found.items():
        assert intervals.width[~intervals.exact].max() <= 1e-3
        total = intervals.lower.numel()
        benchmark.extra_info[kind] = f"{intervals.evaluated} of {total} scored"


def test_stack_neuron_results_and_logit_attrs(case, measure):
    measure(case.stack_neuron_results, rounds=3)


def test_gradient_x_activation(case, measure):
    measure(case.gradient_x_activation, rounds=3, enabled_grad=True)


def test_integrated_gradients_20_steps_a_layer(case, measure):
    if case.tokens.shape[1] > 16:
        pytest.skip("minutes; measured at 16 tokens")
    measure(case.integrated_gradients, rounds=1, enabled_grad=True)
