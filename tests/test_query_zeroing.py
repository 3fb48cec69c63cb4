"""Zeroing query neurons takes the answer away; the page shows what was measured."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from conftest import bundled_model, leaving_the_random_state
from transformers import AutoTokenizer, GPT2LMHeadModel

from tl_neuron_attr import attribute
from tl_neuron_attr.knowledge import KNOWLEDGE_TYPES
from tl_neuron_attr.tiny_facts import tiny_facts_dir
from tl_neuron_attr.tiny_facts.zeroing import query_neurons, zeroing_effects

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def bundled():
    """The bundled model as Hugging Face and as TransformerLens have it, and its tokenizer."""
    return leaving_the_random_state(
        lambda: (
            GPT2LMHeadModel.from_pretrained(tiny_facts_dir(), local_files_only=True),
            bundled_model(),
            AutoTokenizer.from_pretrained(tiny_facts_dir(), local_files_only=True),
        )
    )()


@pytest.mark.slow
def test_zeroing_query_neurons_takes_far_more_from_the_answer_than_zeroing_random_ones(bundled):
    effects = zeroing_effects(*bundled, choose=query_neurons, zeroed=(10, 100), prompts_per_type=2)
    row = effects[0]
    assert row.prompts == 2 * len(KNOWLEDGE_TYPES)
    assert row.random[10] > row.original - 0.05
    assert row.random[100] > row.original - 0.1
    assert row.top[10] < row.random[10] - 0.3
    assert row.top[100] < row.random[100] - 0.5
    assert row.top[100] < row.foreign[100] - 0.3


def test_query_neurons_are_those_that_feed_the_30_best_attention_neurons(bundled):
    _, bridge, tokenizer = bundled
    tokens = [tokenizer.bos_token_id, *tokenizer.encode("The capital of France is")]
    (answer,) = tokenizer.encode(" Paris")
    found = query_neurons(bridge, tokens, answer, top=20)
    assert len(set(found)) == 20
    values = attribute(bridge, tokens, target=answer, top=30).attn_neurons.neurons()
    deepest = max(neuron.layer for neuron in values)
    assert all(neuron.layer < deepest for neuron in found)
    # most fire where France stands, from which those attention neurons fetch
    place = tokens.index(tokenizer.encode(" France")[0])
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor([tokens]))
    active = [float(cache[f"blocks.{n.layer}.mlp.hook_post"][0, place, n.index]) for n in found]
    assert sum(m > 0 for m in active) >= 15


def test_the_tables_on_the_page_are_what_was_measured():
    script = runpy.run_path(str(DOCS / "query_zeroing.py"))
    facts = json.loads((DOCS / "pages" / "query_zeroing.json").read_text(encoding="utf-8"))
    page = (DOCS / "pages" / "query.md").read_text(encoding="utf-8")
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert script["table"](facts) in page
    assert script["types_table"](facts) in page
    row = facts["query"]["effects"][0]
    assert f"over {row['prompts']} prompts" in page
    assert f"In {facts['query']['prompts_without_any']} of the {row['prompts']} prompts" in page
    for number in (row["original"], row["top"]["30"], row["random"]["30"]):
        assert f"{number:.3f}" in readme
