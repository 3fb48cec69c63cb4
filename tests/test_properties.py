"""What must hold of every model, prompt and target, tried on as many as the profile asks for.

Bounds and intervals have their properties in ``test_topk.py`` and ``test_intervals.py``; order,
batch size and budget in ``test_attribute.py``; blocks of the vocabulary in ``test_scores.py``.
"""

import functools
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import bridge_from
from hypothesis import given, settings
from hypothesis import strategies as st
from test_intervals import index_of
from test_topk import build, cases, dense_scores

from tl_neuron_attr import (
    AttnNeuron,
    FFNNeuron,
    Prompt,
    attribute,
    capture,
    capture_all,
    load_capture,
    open_host,
    save_capture,
    score_intervals,
    tokenize,
    top_neurons,
)
from tl_neuron_attr.captured import TENSORS
from tl_neuron_attr.decompose import attn_decompositions, ffn_decompositions
from tl_neuron_attr.tables import write_run
from tl_neuron_attr.topk import score_bounds

_SMALL = dict(vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
_FFN = dict(intermediate_size=12, max_position_embeddings=16)
KINDS = {
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=13, n_embd=8, n_head=2, n_layer=2, n_positions=16, n_ctx=16
        ),
    ),
    # grouped heads, a gate, an RMSNorm
    "llama": (
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(**_SMALL, **_FFN, num_key_value_heads=1),
    ),
    "neox-parallel": (
        "GPTNeoXForCausalLM",
        lambda: transformers.GPTNeoXConfig(**_SMALL, **_FFN, use_parallel_residual=True),
    ),
    # norms on what sub-layers write
    "olmo2": (
        "Olmo2ForCausalLM",
        lambda: transformers.Olmo2Config(**_SMALL, **_FFN, num_key_value_heads=2, pad_token_id=0),
    ),
}


@functools.cache
def small(kind, seed, dtype):
    class_name, config = KINDS[kind]
    return open_host(bridge_from(class_name, config(), seed=seed, dtype=dtype))


kinds, seeds = st.sampled_from(list(KINDS)), st.integers(0, 5)
models = st.tuples(kinds, seeds, st.just(torch.float64))
narrow_models = st.tuples(kinds, seeds, st.just(torch.float32))
tokens = st.lists(st.integers(0, 12), min_size=1, max_size=7).map(tuple)
targets = st.integers(0, 12)


@st.composite
def questions(draw):
    """A prompt read anywhere, about any token or any two."""
    asked = draw(tokens)
    target = draw(targets)
    against = draw(st.none() | targets.filter(lambda other: other != target))
    position = draw(st.integers(-len(asked), len(asked) - 1))
    return Prompt(tokens=asked, target=target, against=against, position=position)


def close(found, wanted, tolerance):
    """Equal but for rounding, which is in proportion to the larger of what is compared and 1."""
    found, wanted = (torch.as_tensor(each, dtype=torch.float64) for each in (found, wanted))
    assert found.shape == wanted.shape
    error, size = (found - wanted).abs().max(), wanted.abs().max().clamp(min=1)
    assert error <= tolerance * size, f"off by {error:.3g} of {size:.3g}"


# --- sums -------------------------------------------------------------------------------------


@given(models, questions())
def test_neurons_and_the_bias_sum_to_what_each_sub_layer_adds(model, question):
    host = small(*model)
    captured = capture(host, tokenize(host, question))
    (ffns,), (attns,) = (of(host, [captured]) for of in (ffn_decompositions, attn_decompositions))
    for layer, (ffn, attn) in enumerate(zip(ffns, attns, strict=True)):
        for block, bias, written in (
            (ffn, ffn.b_out, captured.mlp_out[layer]),
            (attn, attn.b_O, captured.attn_out[layer]),
        ):
            neurons = block.vectors(torch.arange(block.n_neurons)).sum(0)
            # Hugging Face's RMSNorm, where it stands behind the sub-layer, computes in float32
            tolerance = 1e-12 if host.post_norm(layer, "ffn") is None else 1e-6
            close(neurons if bias is None else neurons + bias, written, tolerance)
            close(block.sum(), neurons, 1e-12)
        heads = attn.head_vectors()
        close(attn.position_vectors().sum(1), heads, 1e-12)
        summed = attn.over_sources()
        close(summed.vectors(torch.arange(summed.n_neurons)).sum(0), heads.sum(0), 1e-12)


@given(models, questions(), st.sampled_from(["exact", "published", "recomputed"]))
def test_rises_of_the_layers_telescope_from_the_embedding_to_the_end(model, question, convention):
    host = small(*model)
    found = attribute(host.model, question, top=1, convention=convention)
    whole = found.log_prob - found.embedding_log_prob
    rises = found.layer_scores.attn.sum() + found.layer_scores.ffn.sum()
    if not host.parallel:
        close(rises, whole, 1e-11)
        return
    # attention and FFN add to one stream: each block as a whole telescopes
    run, blocks = found.captured, torch.zeros((), dtype=torch.float64)
    for layer in range(host.n_layers):
        before = run.resid_pre[layer]
        after = before + run.attn_out[layer] + run.mlp_out[layer]
        both = found.out.log_prob(torch.stack([before, after]), found.target)
        blocks += both[1] - both[0]
    close(blocks, whole, 1e-11)


@given(models, questions(), st.sampled_from(["ffn", "attn", "both"]))
def test_query_contributions_sum_to_the_pre_activation_the_model_computes(model, question, kind):
    host = small(*model)
    found = attribute(host.model, question, top=10)
    scores = found.query_scores(kind, top_values=10)
    rows = scores.inputs
    with torch.no_grad():
        _, cache = host.model.run_with_cache(torch.tensor([question.tokens]))
    neurons = [neuron for ranked in scores.values for neuron in ranked.neurons()]
    hooks = {"pre": "hook_pre", "gate": "hook_pre", "up": "hook_pre_linear"}
    read_pos = found.captured.prompt.read_pos
    theirs = []
    for row, name in zip(rows.value.tolist(), rows.input, strict=True):
        neuron = neurons[row]
        if isinstance(neuron, FFNNeuron):
            seen = cache[f"blocks.{neuron.layer}.mlp.{hooks[name]}"]
            theirs.append(seen[0, read_pos, neuron.index])
        else:
            assert isinstance(neuron, AttnNeuron)
            v = cache[f"blocks.{neuron.layer}.attn.hook_v"][0, neuron.source_pos]
            theirs.append(v[neuron.head // (host.n_heads // len(v)), neuron.index])
    # Hugging Face's RMSNorm computes in float32
    tolerance = 1e-11 if host.norm == "layer_norm" else 1e-5
    summed = rows.parts.sum(1) + rows.bias
    close(summed / rows.absolute, torch.stack(theirs) / rows.absolute, tolerance)
    close(summed / rows.absolute, rows.total / rows.absolute, 1e-11)
    kept = torch.cat([ranked.score for ranked in scores.values])[~scores.left_out].sum()
    handed = scores.embed + scores.bias + scores.attn.sum() + scores.ffn.sum()
    size = (rows.weight.abs() * rows.absolute).sum().clamp(min=1)
    close(handed / size, kept / size, 1e-11)


# --- what must not matter ---------------------------------------------------------------------


def blocks_permuted(block, order):
    """The same neurons in another order: of an FFN its units, of attention its heads."""
    if hasattr(block, "W_out"):
        return replace(block, coefficients=block.coefficients[order], W_out=block.W_out[order])
    v = block.v.repeat_interleave(block.pattern.shape[0] // block.v.shape[1], 1)
    return replace(block, pattern=block.pattern[order], v=v[:, order], W_O=block.W_O[order])


@given(cases, st.randoms(use_true_random=False), st.integers(1, 17))
def test_the_order_of_neurons_changes_no_score_bound_or_interval(case, random, top):
    out, blocks, target = build(case, torch.float64)
    count = 12 if case["kind"] == "ffn" else 4
    order = torch.tensor(random.sample(range(count), count))
    other = [blocks_permuted(block, order) for block in blocks]

    def in_order(values):
        rows = values.view(len(blocks), count, -1)
        return rows[:, order].flatten()

    before = out.baseline(torch.stack([block.base for block in blocks]), target)
    bounds, slack = score_bounds(blocks, out, before)
    room = max(slack, 1e-12)
    assert torch.allclose(
        dense_scores(other, out, target), in_order(dense_scores(blocks, out, target)), atol=room
    )
    assert torch.allclose(score_bounds(other, out, before)[0], in_order(bounds), atol=room)
    best, others = (top_neurons(each, out, target, top) for each in (blocks, other))
    assert torch.allclose(best.score, others.score, atol=room)
    kinds = [score_intervals(each, out, target, index_of(each, out)) for each in (blocks, other)]
    for name in ("lower", "upper"):
        ours, theirs = (getattr(each, name).flatten() for each in kinds)
        # what is wide enough to be evaluated may be so in one order alone
        assert torch.allclose(in_order(ours), theirs, atol=room + 2 * kinds[0].tolerance)


@given(cases, st.floats(-3, 3), st.integers(0, 2**31), st.integers(1, 17))
def test_a_constant_shift_of_the_unembedding_changes_nothing(case, constant, seed, top):
    """Logits that all move alike are the same prediction."""
    out, blocks, target = build(case, torch.float64)
    noise = torch.randn(
        case["d_model"], 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    shifted = replace(out, W_U=out.W_U + noise, b_U=out.b_U + constant)
    bases = torch.stack([block.base for block in blocks])
    before, after = (each.baseline(bases, target) for each in (out, shifted))
    bounds, slack = score_bounds(blocks, out, before)
    moved, more = score_bounds(blocks, shifted, after)
    room = max(slack, more, 1e-12)
    close(out.log_prob(bases, target), shifted.log_prob(bases, target), room)
    scores = dense_scores(blocks, out, target)
    assert torch.allclose(dense_scores(blocks, shifted, target), scores, atol=room)
    assert torch.allclose(moved, bounds, atol=2 * room)
    best, others = (top_neurons(blocks, each, target, top) for each in (out, shifted))
    assert torch.allclose(best.score, others.score, atol=room)


@given(
    narrow_models,
    st.lists(questions(), min_size=2, max_size=5),
    st.sampled_from(["right", "left"]),
)
def test_neither_other_prompts_nor_the_side_of_padding_change_a_run(model, asked, side):
    host = small(*model)
    prompts = [tokenize(host, question) for question in asked]
    together = capture_all(host, prompts, padding_side=side)
    for prompt, found in zip(prompts, together, strict=True):
        alone = capture(host, prompt)
        for name in TENSORS:
            if getattr(alone, name) is not None:
                close(getattr(found, name), getattr(alone, name), 1e-5)


# --- saved and loaded -------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8"), max_size=12)


@given(models | narrow_models, questions(), names)
def test_a_capture_is_read_back_to_the_bit(model, question, name):
    host = small(*model)
    captured = capture(host, tokenize(host, replace(question, prompt_id=name)))
    with tempfile.TemporaryDirectory() as directory:
        save_capture(captured, directory)
        loaded = load_capture(directory)
    assert loaded.prompt == captured.prompt and loaded.model_name == captured.model_name
    for field in TENSORS:
        ours, theirs = getattr(captured, field), getattr(loaded, field)
        assert (ours is None) == (theirs is None), field
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs)), field


def values_of(table):
    """Every cell as plain values: lists of tokens as lists, all that is missing as None."""

    def plain(value):
        if isinstance(value, (list, np.ndarray)):
            return list(value)
        return None if pd.isna(value) else value

    return {name: [plain(value) for value in table[name]] for name in table}


@given(kinds, seeds, questions(), st.integers(1, 20))
def test_saved_tables_are_read_back_to_the_bit(kind, seed, question, top):
    found = attribute(small(kind, seed, torch.float64).model, question, top=top)
    tables = {"layers": found.layers(), "heads": found.heads(), "neurons": found.neurons(tokens=3)}
    with tempfile.TemporaryDirectory() as directory:
        write_run(Path(directory), tables, {"run.json": "{}"})
        for name, table in tables.items():
            read = pd.read_parquet(f"{directory}/{name}.parquet")
            assert values_of(read) == values_of(table)


# --- they can fail ----------------------------------------------------------------------------


def test_a_norm_that_is_not_frozen_at_the_runs_scale_breaks_the_telescope(monkeypatch):
    host = small("gpt2", 0, torch.float64)
    found = attribute(host.model, (3, 1, 4), top=1)
    other = replace(found.out, norm_scale=found.out.norm_scale * 1.001)
    bases = torch.stack([found.captured.resid_pre[0], found.captured.resid_final])
    ends = other.log_prob(bases, found.target)
    rises = found.layer_scores.attn.sum() + found.layer_scores.ffn.sum()
    with pytest.raises(AssertionError, match="off by"):
        close(rises, ends[1] - ends[0], 1e-11)


def test_a_shift_of_one_tokens_direction_alone_is_noticed():
    case = {
        **{"seed": 5, "kind": "ffn", "d_model": 6, "d_vocab": 9},
        **{"tail": 1.0, "scale": 1.0, "centered": True},
    }
    out, blocks, target = build(case, torch.float64)
    W_U = out.W_U.clone()
    W_U[:, 3] += 0.001
    with pytest.raises(AssertionError, match="off by"):
        close(
            dense_scores(blocks, replace(out, W_U=W_U), target),
            dense_scores(blocks, out, target),
            1e-8,
        )


# --- how many examples ------------------------------------------------------------------------


def test_no_test_chooses_how_many_examples_it_is_tried_on():
    here = Path(__file__)
    choosing = [
        path.name
        for path in here.parent.glob("test_*.py")
        if re.search(r"^@settings\(", path.read_text(encoding="utf-8"), re.M)
    ]
    assert choosing == []
    profiles = {name: settings.get_profile(name) for name in ("ci", "nightly")}
    assert {name: each.max_examples for name, each in profiles.items()} == {
        "ci": 50,
        "nightly": 1000,
    }
    assert profiles["ci"].derandomize and not profiles["nightly"].derandomize
