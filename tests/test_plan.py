"""The plan against the run: shapes, operations and bytes, as torch itself counts them."""

import json
import math
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    FAMILIES,
    bridge_of,
    bundled_model,
    hooked_of,
    hugging_face_model,
    leaving_the_random_state,
    needs_hooked_transformer,
)
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_neuron_attr import (
    InputError,
    Prompt,
    UnsupportedModelError,
    attribute,
    attribute_all,
    capture,
    load_model,
    open_host,
    plan,
    read_out,
    tokenize,
)
from tl_neuron_attr.index import projection_index
from tl_neuron_attr.plan import Cost, in_bytes, in_time, shapes_of
from tl_neuron_attr.tiny_facts import tiny_facts_dir

N_TOKENS = 24
TOKENS = tuple(range(3, 3 + N_TOKENS))

# Larger than the families' own: with read-outs, not the forward pass, at the peak.
LARGER = {
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=5000, n_embd=64, n_layer=4, n_head=4, n_positions=512, n_ctx=512
        ),
    ),
    "llama": (
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(
            vocab_size=9000,
            hidden_size=128,
            intermediate_size=300,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=512,
        ),
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        lambda: transformers.Gemma2Config(
            vocab_size=9000,
            hidden_size=128,
            intermediate_size=300,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            attn_implementation="eager",
        ),
    ),
    "gpt2-small": ("GPT2LMHeadModel", lambda: transformers.GPT2Config()),
    # what is small in most models is most of the memory of these
    "keys and values": ("LlamaForCausalLM", lambda: odd_llama(24, 2, 64, 16)),
    "attention and FFN": ("LlamaForCausalLM", lambda: odd_llama(1, 8, 32, 2500)),
}


def odd_llama(n_layers, n_heads, d_model, d_mlp):
    return transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        max_position_embeddings=512,
    )


def config_of(family):
    return FAMILIES[family][1]()


def quick(config, **request):
    """A plan that measures no rates."""
    return plan(config, **{"operations_per_second": 1e10, **request})


@leaving_the_random_state
def larger(name, dtype=torch.float32):
    class_name, config = LARGER[name]
    config = config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = hugging_face_model(class_name, config).to(dtype)
        return build_bridge_from_module(
            hf, class_name, hf_config=config, dtype=dtype, device="cpu"
        ).eval()


def some_tokens(n_tokens, below):
    generator = torch.Generator().manual_seed(n_tokens)
    return tuple(torch.randint(0, below, (n_tokens,), generator=generator).tolist())


def measured_peak(work):
    """Most bytes that torch held at a time for ``work``, from its own record of allocations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            kept = work()
    assert kept is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# --- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_from_the_configuration_are_those_of_the_model(family):
    found = shapes_of(config_of(family))
    model = bridge_of(family)
    host = open_host(model)
    names = "n_layers n_heads n_key_value_heads d_model d_head d_mlp d_vocab parallel".split()
    assert {name: getattr(found, name) for name in names} == {
        name: getattr(host, name) for name in names
    }
    assert found.gated == bool(model.cfg.gated_mlp)
    assert found.n_ctx in (host.n_ctx, None)
    assert asdict(quick(model, n_tokens=3).shapes) == asdict(
        replace(found, n_ctx=host.n_ctx, activation=found.activation or model.cfg.act_fn)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_without_reading_them(family):
    found = quick(config_of(family), n_tokens=3)
    of_model = quick(bridge_of(family), n_tokens=3)
    # norms and biases, which are left out, are a larger part of a tiny model than of any other
    assert found.weight_bytes == pytest.approx(of_model.weight_bytes, rel=0.1)
    assert quick(config_of(family), n_tokens=3, dtype="bfloat16").weight_bytes == (
        found.weight_bytes // 2
    )


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_hooked_transformer_has_a_plan_of_its_own(family):
    bridge, hooked = (quick(made(family), n_tokens=N_TOKENS) for made in (bridge_of, hooked_of))
    assert hooked.dense.operations == bridge.dense.operations
    model = hooked_of(family)
    peak = measured_peak(lambda: attribute(model, TOKENS, top=20))
    found = quick(model, n_tokens=N_TOKENS, top=20)
    assert found.certified.peak_bytes == pytest.approx(peak, rel=0.25)


def test_what_a_configuration_leaves_unsaid():
    neo = config_of("neo")
    neo.intermediate_size = None
    assert shapes_of(neo).d_mlp == 4 * neo.hidden_size
    bigcode = config_of("bigcode")
    bigcode.multi_query = False
    bigcode.num_key_value_heads = None
    assert shapes_of(bigcode).n_key_value_heads == bigcode.n_head


def test_only_the_configuration_is_read(tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_facts_dir() / "config.json").read_bytes())
    with pytest.raises(InputError, match="no weights"):
        load_model(str(tmp_path))
    by_name = quick("tiny-facts", n_tokens=6)
    assert quick(tmp_path, n_tokens=6) == quick(str(tmp_path), n_tokens=6) == by_name
    model = quick(bundled_model(), n_tokens=6)
    assert replace(model, weight_bytes=by_name.weight_bytes) == by_name


# --- operations -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel", "gemma"])
def test_operations_are_those_that_torch_counts(family):
    host = open_host(bridge_of(family))
    prompt = tokenize(host, Prompt(tokens=TOKENS))
    attribute(host.model, TOKENS)  # the self-check of a model's first run is not counted
    with FlopCounterMode(display=False) as forward:
        captured = capture(host, prompt)
    with FlopCounterMode(display=False) as scoring:
        found = attribute(host.model, captured, convention="recomputed", top=20)
    for certificate in found.certificates().values():
        assert certificate["evaluated"] == certificate["total"]
    expected = quick(config_of(family), n_tokens=N_TOKENS, convention="recomputed", top=20)
    assert expected.forward.operations == pytest.approx(forward.get_total_flops(), rel=0.1)
    assert expected.dense.operations - expected.forward.operations == pytest.approx(
        scoring.get_total_flops(), rel=0.1
    )


def test_certified_operations_on_a_trained_model():
    model = bundled_model()
    captured = attribute(model, "The capital of France is").captured
    with FlopCounterMode(display=False) as scoring:
        found = attribute(model, captured, top=5)
    expected = quick(model, n_tokens=len(captured.prompt.tokens), top=5)
    scored = sum(certificate["evaluated"] for certificate in found.certificates().values())
    layers, heads = found.host.n_layers, found.host.n_heads
    assert expected.certified.readouts == pytest.approx(scored + layers * (2 + heads), rel=0.1)
    assert expected.certified.operations - expected.forward.operations == pytest.approx(
        scoring.get_total_flops(), rel=0.1
    )
    assert expected.certified.operations < expected.dense.operations / 10


def test_dense_counts_every_neuron_and_certified_those_asked_for():
    shapes = shapes_of(config_of("llama"))
    found = quick(config_of("llama"), n_tokens=10, top=5)
    layers_and_heads = 3 * 2 + 3 * 4
    assert shapes.n_neurons(10) == (3 * 40, 3 * 4 * 10 * 6)
    assert found.dense.readouts == layers_and_heads + 3 * 40 + 3 * 4 * 10 * 6
    assert found.certified.readouts == layers_and_heads + 2 * math.ceil(1.1 * 5)
    assert found.index.readouts == 3 * (40 + 4 * 6)
    assert found.index.operations == 3 * (40 + 4 * 6) * 2 * 24 * 61
    assert (found.forward.readouts, found.forward.blocks) == (0, 0)


def test_where_nothing_can_be_excluded_certified_is_dense():
    some = {"n_tokens": 10, "top": 5}
    recomputed = quick(config_of("llama"), convention="recomputed", **some)
    assert recomputed.certified == recomputed.dense
    exact = quick(config_of("llama"), **some)
    assert exact.certified.operations < exact.dense.operations
    everything = quick(config_of("llama"), n_tokens=10, top=10_000)
    assert everything.certified == everything.dense


def test_prompts_add_up_and_batches_share_memory():
    def of(**request):
        return quick(config_of("llama"), n_tokens=10, top=5, **request)

    one, many = of(), of(n_prompts=40)
    assert many.batch_size == 16
    for kind in ("forward", "certified", "dense"):
        assert getattr(many, kind).operations == 40 * getattr(one, kind).operations
        assert getattr(many, kind).readouts == 40 * getattr(one, kind).readouts
        assert getattr(many, kind).peak_bytes > getattr(one, kind).peak_bytes
    assert many.index == one.index
    assert of(n_prompts=40, batch_size=4).forward.peak_bytes < many.forward.peak_bytes
    assert of(n_prompts=2).batch_size == 2
    # no more prompts together than have their predictions in the budget
    assert of(n_prompts=40, budget=10 * 4 * 4 * 3 * 61).batch_size == 10


def test_blocks_are_the_engines_own():
    model = larger("gpt2")
    host = open_host(model)
    out = read_out(host, torch.zeros(64), budget=2_000_000)
    found = quick(model, n_tokens=10, budget=2_000_000, top=40)
    assert found.rows_per_block == out.rows_per_block < 512
    assert found.columns_per_block == 4096
    readouts = 4 * (2 + 4) + 2 * math.ceil(1.1 * 40)
    assert found.certified.blocks == math.ceil(readouts / out.rows_per_block) * 2
    assert found.dense.peak_bytes < quick(model, n_tokens=10, top=40).dense.peak_bytes


# --- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel", "phi3", "gptj"])
def test_peak_bytes_of_a_tiny_model_are_within_a_quarter(family):
    for convention in ("exact", "recomputed"):
        model = bridge_of(family)
        peak = measured_peak(partial(attribute, model, TOKENS, top=20, convention=convention))
        found = quick(config_of(family), n_tokens=N_TOKENS, top=20, convention=convention)
        assert found.certified.peak_bytes == pytest.approx(peak, rel=0.25), convention
        other = quick(config_of(family), n_tokens=3, top=2)
        assert other.certified.peak_bytes != pytest.approx(peak, rel=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [20, 500])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_peak_bytes_of_a_larger_model_are_within_a_quarter(name, n_tokens, dtype):
    config = LARGER[name][1]()
    tokens = some_tokens(n_tokens, config.vocab_size)
    found = quick(config, n_tokens=n_tokens, top=100, dtype=dtype)
    model = larger(name, dtype)
    captured = []
    host = open_host(model)
    prompt = tokenize(host, Prompt(tokens=tokens))
    forward = measured_peak(lambda: captured.append(capture(host, prompt)) or captured)
    assert found.forward.peak_bytes == pytest.approx(forward, rel=0.25)
    model = larger(name, dtype)
    certified = measured_peak(lambda: attribute(model, tokens, top=100))
    assert found.certified.peak_bytes == pytest.approx(certified, rel=0.25)
    # the shorter prompt's peak is in the read-out; the longer one's forward pass takes as much
    share = found.forward.peak_bytes / found.certified.peak_bytes
    assert share < 0.5 if n_tokens == 20 else share > 0.9


def test_peak_bytes_of_prompts_run_together_are_within_a_quarter():
    model = larger("llama")
    prompts = [Prompt(tokens=some_tokens(30 + n, 9000)[:30]) for n in range(6)]
    peak = measured_peak(lambda: attribute_all(model, prompts, top=100, batch_size=3))
    found = quick(LARGER["llama"][1](), n_tokens=30, n_prompts=6, batch_size=3, top=100)
    assert found.certified.peak_bytes == pytest.approx(peak, rel=0.25)
    alone = quick(LARGER["llama"][1](), n_tokens=30, top=100)
    assert alone.certified.peak_bytes != pytest.approx(peak, rel=0.25)


@pytest.mark.parametrize(
    ("name", "n_tokens"), [("keys and values", 40), ("attention and FFN", 300)]
)
def test_peak_bytes_of_an_odd_model_are_within_a_quarter(name, n_tokens):
    model = larger(name)
    peak = measured_peak(lambda: attribute(model, some_tokens(n_tokens, 61), top=5))
    found = quick(LARGER[name][1](), n_tokens=n_tokens, top=5)
    assert found.certified.peak_bytes == pytest.approx(peak, rel=0.25)


def test_results_of_earlier_batches_are_counted():
    model = bridge_of("llama")
    prompts = [Prompt(tokens=some_tokens(30 + n, 61)[:30]) for n in range(12)]
    peak = measured_peak(lambda: attribute_all(model, prompts, top=5, batch_size=1))
    found = quick(config_of("llama"), n_tokens=30, n_prompts=12, batch_size=1, top=5)
    assert found.certified.peak_bytes == pytest.approx(peak, rel=0.25)
    alone = quick(config_of("llama"), n_tokens=30, top=5)
    assert alone.certified.peak_bytes < 0.5 * peak


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peak_bytes_of_the_projection_index_are_within_a_quarter(family, tmp_path):
    model = larger(family)
    peak = measured_peak(lambda: projection_index(model, tmp_path))
    found = quick(LARGER[family][1](), n_tokens=3)
    assert found.index.peak_bytes == pytest.approx(peak, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("n_tokens", [16, 512])
def test_peak_bytes_at_gpt2_smalls_shape_are_within_a_quarter(n_tokens):
    model = larger("gpt2-small")
    tokens = some_tokens(n_tokens, 50_000)
    peak = measured_peak(lambda: attribute(model, tokens))
    found = quick(LARGER["gpt2-small"][1](), n_tokens=n_tokens)
    assert found.certified.peak_bytes == pytest.approx(peak, rel=0.25)


# --- time, text, errors -----------------------------------------------------------------------


def test_time_is_operations_over_the_rate():
    found = plan(config_of("llama"), n_tokens=10, top=5, operations_per_second=1e6)
    for kind in ("forward", "certified", "dense", "index"):
        cost = getattr(found, kind)
        assert cost.seconds == pytest.approx(cost.operations / 1e6)


def test_the_rate_is_measured_where_none_is_given():
    config = LARGER["gpt2-small"][1]()
    short, long = (plan(config, n_tokens=n_tokens) for n_tokens in (16, 512))
    for found in (short, long):
        for cost in (found.forward, found.certified, found.dense, found.index):
            # slower than any machine is, faster than any is
            assert 1e6 < cost.operations / cost.seconds < 1e18
    assert short.dense.seconds > short.certified.seconds > short.forward.seconds
    assert long.forward.seconds > 2 * short.forward.seconds


def test_a_device_that_is_not_there_is_refused_unless_it_need_not_be_measured():
    for device in ("no-such-device", "cuda:99"):
        with pytest.raises(InputError, match=f"cannot measure rates on '{device}'"):
            plan(config_of("llama"), n_tokens=10, device=device)
        assert quick(config_of("llama"), n_tokens=10, device=device).dense.readouts > 0


def test_a_plan_prints_as_a_table():
    text = str(plan(transformers.GPT2Config(), n_tokens=16, operations_per_second=5e10))
    lines = text.splitlines()
    assert "12 layers, 12 heads of 64, d_model 768, d_mlp 3,072, 50,257 tokens" in lines[0]
    assert "16 tokens, best 300 neurons of each kind, exact" in lines[1]
    assert [line.split()[0] for line in lines[4:8]] == ["forward", "certified", "dense", "index"]
    assert "512 vectors x 4,096 tokens" in text
    assert max(map(len, lines)) <= 100
    assert "3 prompts of 16 tokens" in str(quick(config_of("llama"), n_tokens=16, n_prompts=3))


def test_the_table_on_the_page_is_what_is_printed():
    page = Path(__file__).parents[1] / "docs" / "pages" / "cost.md"
    printed = str(plan(transformers.GPT2Config(), n_tokens=16, operations_per_second=5e10))
    assert printed in page.read_text(encoding="utf-8")


def test_a_cost_survives_json():
    cost = quick(config_of("llama"), n_tokens=4).dense
    assert Cost(**json.loads(json.dumps(asdict(cost)))) == cost


def test_numbers_as_people_read_them():
    assert [in_bytes(n) for n in (3, 1023, 2048, 36_425_224, 2**44)] == [
        "3 B",
        "0.999 KiB",
        "2 KiB",
        "34.7 MiB",
        "16 TiB",
    ]
    assert [in_time(s) for s in (0.004, 0.85, 119.0, 700.0, 9000.0, 1e8)] == [
        "4 ms",
        "0.85 s",
        "119 s",
        "12 min",
        "2.5 h",
        "1,157 d",
    ]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"n_tokens": 0}, "n_tokens must be at least 1"),
        ({"n_tokens": 33}, "33 tokens are longer than the model's context of 32"),
        ({"top": 0}, "top must be at least 1"),
        ({"n_prompts": 0}, "n_prompts must be at least 1"),
        ({"budget": 10}, "budget of 10 bytes is too small"),
        ({"dtype": "int8"}, "dtype must be float32"),
        ({"operations_per_second": 0.0}, "operations_per_second must be positive"),
    ],
)
def test_a_request_that_cannot_be_run_is_refused(request_, words):
    with pytest.raises(InputError, match=words):
        quick(config_of("llama"), **{"n_tokens": 4, **request_})


def test_a_configuration_that_is_none_is_refused():
    class Odd:
        model_type = "odd"
        hidden_size = 8

    with pytest.raises(InputError, match="'odd' lacks n_layers, n_heads, d_mlp, d_vocab"):
        quick(Odd(), n_tokens=4)
    with pytest.raises(InputError, match="no such directory"):
        quick("./absent", n_tokens=4)
    with pytest.raises(InputError, match="cannot read the configuration of 'no-such/model'"):
        quick("no-such/model", n_tokens=4)
    with pytest.raises(UnsupportedModelError, match="whose router is not known"):
        quick(transformers.DeepseekV3Config(), n_tokens=4)
    with pytest.raises(UnsupportedModelError, match="others do not"):
        quick(transformers.Qwen3MoeConfig(decoder_sparse_step=2), n_tokens=4)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        quick(transformers.T5Config(), n_tokens=4)
