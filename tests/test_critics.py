"""What the page on the critics measures, against its definition; the page shows what came out."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from conftest import bundled_model, leaving_the_random_state
from transformers import AutoTokenizer, GPT2LMHeadModel

from tl_neuron_attr import attribute, open_host
from tl_neuron_attr.knowledge import knowledge_prompts
from tl_neuron_attr.tiny_facts import tiny_facts_dir
from tl_neuron_attr.tiny_facts.editing import (
    edited,
    explained,
    fit_edits,
    probabilities_with,
    rank_correlations,
)
from tl_neuron_attr.tiny_facts.resampling import interval, mean, ratio
from tl_neuron_attr.tiny_facts.self_repair import best_as_parts, layers_as_parts, removal_effects
from tl_neuron_attr.tiny_facts.wordings import (
    KINSHIPS,
    left_without,
    mask_of,
    overlap,
    ranked_ffn_neurons,
    relatives,
)

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def bridge():
    return bundled_model()


@pytest.fixture(scope="module")
def model():
    """The same weights as Hugging Face has them."""
    load = leaving_the_random_state(
        lambda: GPT2LMHeadModel.from_pretrained(tiny_facts_dir(), local_files_only=True)
    )
    return load().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_facts_dir(), local_files_only=True)


@pytest.fixture(scope="module")
def known():
    return knowledge_prompts("capital", trained=True) + knowledge_prompts("language", trained=True)


def prompt_of(known, text):
    return next(prompt for prompt in known if prompt.text == text)


def answer_logit_and_log_prob(logits, answer):
    return torch.stack([logits[answer] - logits.mean(), logits.log_softmax(-1)[answer]])


def blocks_and_logits(model, tokens, change):
    """What each block writes at the last position, and the logits there, ``change``d on the way."""
    written, handles = {}, []
    blocks = model.transformer.h

    def keep(place):
        def hook(module, inputs, output):
            written[place] = (output[0] if isinstance(output, tuple) else output)[0, -1].double()

        return hook

    for layer, block in enumerate(blocks):
        for kind, out in (("attn", block.attn.c_proj), ("ffn", block.mlp.c_proj)):

            def before(module, inputs, layer=layer, kind=kind):
                edited = inputs[0].clone()
                edited[0, -1] = change(layer, kind, edited[0, -1])
                return (edited,)

            handles.append(out.register_forward_pre_hook(before))
        handles.append(block.attn.register_forward_hook(keep((layer, "attn"))))
        handles.append(block.mlp.register_forward_hook(keep((layer, "ffn"))))
    try:
        with torch.no_grad():
            logits = model(tokens).logits[0, -1].double()
    finally:
        for handle in handles:
            handle.remove()
    return written, logits


@pytest.mark.parametrize("resampled", [False, True])
def test_removal_effects_are_those_of_their_definition(bridge, model, resampled):
    host = open_host(bridge)
    result = attribute(bridge, "The capital of France is", target=" Paris", top=3)
    other = attribute(bridge, "In Japan, people speak", target=" Japanese", top=1).captured
    captured, answer = result.captured, result.target.id
    parts = best_as_parts(
        host, captured.mlp_post, captured.z * torch.arange(host.d_head), 2
    )  # any scores will do
    layers = layers_as_parts(host)
    parts = type(parts)(
        ffn=torch.cat([layers.ffn, parts.ffn]), attn=torch.cat([layers.attn, parts.attn])
    )
    instead = other if resampled else None
    found = removal_effects(host, captured, answer, parts, instead=instead)

    tokens = torch.tensor([captured.prompt.tokens])
    order = [(layer, kind) for layer in range(host.n_layers) for kind in ("attn", "ffn")]
    clean, logits = blocks_and_logits(model, tokens, lambda layer, kind, value: value)
    norm, unembed = model.transformer.ln_f, model.lm_head.weight.double()
    final = captured.resid_final.double()
    scale = (final.var(unbiased=False) + norm.eps).sqrt()

    def read(resid, scale=scale):
        scale = (resid.var(unbiased=False) + norm.eps).sqrt() if scale is None else scale
        normed = (resid - resid.mean()) / scale * norm.weight.double() + norm.bias.double()
        return answer_logit_and_log_prob(unembed @ normed, answer)

    before = answer_logit_and_log_prob(logits, answer)
    for part in range(len(parts)):

        def change(layer, kind, value, part=part):
            masks = parts.attn if kind == "attn" else parts.ffn
            others = (other.z if kind == "attn" else other.mlp_post) if resampled else None
            new = torch.zeros_like(value) if others is None else others[layer].flatten()
            return torch.where(masks[part, layer].flatten(), new, value)

        contribution = torch.zeros_like(final)
        for layer in range(host.n_layers):
            for kind, coefficients in (("attn", captured.z), ("ffn", captured.mlp_post)):
                value = coefficients[layer].flatten()
                block = model.transformer.h[layer]
                weight = (block.attn if kind == "attn" else block.mlp).c_proj.weight
                taken = value - change(layer, kind, value)
                contribution += taken.double() @ weight.double()
        after, changed = blocks_and_logits(model, tokens, change)
        expected = {
            "direct": before - read(final - contribution),
            "renormed": before - read(final - contribution, None),
            "total": before - answer_logit_and_log_prob(changed, answer),
        }
        for name, value in expected.items():
            actual = getattr(found, name)[part].double()
            assert torch.allclose(actual, value, atol=2e-4), (name, part)
        # what later blocks give back is all that parts the total from the direct, norm frozen
        moved = final + sum(after[place] - clean[place] for place in order)
        frozen_total = (before - read(moved))[0]
        returned = found.compensation[part].double().sum()
        assert abs(found.direct[part, 0] - returned - frozen_total) < 2e-4
        if part < len(order):
            assert found.compensation[part, : part + 1].abs().max() < 2e-4


def test_shares_are_of_sums_and_their_intervals_follow_the_rows():
    above, below = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 8.0])
    assert ratio(above, below).value == pytest.approx(0.5)
    same = ratio(below / 4, below)
    assert (same.low, same.high) == pytest.approx((0.25, 0.25))
    rows = torch.linspace(0, 1, 400)
    found = mean(rows)
    assert found.value == pytest.approx(0.5)
    half_width = 1.96 * rows.std() / 20
    assert found.high - found.low == pytest.approx(2 * float(half_width), rel=0.1)
    assert mean(rows) == found
    counts = interval(3, lambda weights: weights.sum(1))
    assert (counts.low, counts.high) == (3, 3)


def test_relatives_are_what_they_are_called(known):
    prompt = prompt_of(known, "The capital of France is")
    kin = relatives(prompt, known, torch.Generator().manual_seed(0), count=5)
    assert list(kin) == list(KINSHIPS)
    for other in kin["same fact, another trained wording"]:
        assert other.answer == " Paris" and other.text != prompt.text and not other.held_out
    for other in kin["same wording, another subject and answer"]:
        assert other.text.startswith("The capital of ") and other.answer != " Paris"
    for other in kin["same subject, another relation and answer"]:
        assert "France" in other.text and other.answer == " French"
    for other in kin["another knowledge type"]:
        assert other.fact.knowledge_type == "language" and "France" not in other.text
    assert kin["the fact reversed"] == []  # asked for among countries
    assert len(kin["another knowledge type"]) == len(set(kin["another knowledge type"])) == 5


def test_zeroing_the_neurons_of_a_wording_takes_the_same_fact_away_in_another(
    bridge, model, tokenizer, known
):
    own = prompt_of(known, "The capital of France is")
    other = prompt_of(known, "The name of France's capital is")
    stranger = prompt_of(known, "The main language of Japan is")
    ranked = ranked_ffn_neurons(bridge, own, ["log_prob_increase", "query"], 30)
    best = attribute(bridge, own.text, target=own.answer, top=30).ffn_neurons
    assert ranked["log_prob_increase"].tolist() == (best.layer * 512 + best.index).tolist()
    asked = [own, other, stranger, own]
    nothing = torch.zeros(4, 6, 512, dtype=torch.bool)
    zeroed = nothing.clone()
    zeroed[:3] = mask_of(ranked["log_prob_increase"], 6, 512)
    none = left_without(model, tokenizer, asked, nothing)
    left = left_without(model, tokenizer, asked, zeroed)
    assert none.first.all() and (none.probability > 0.8).all()
    assert (left.probability[:2] < none.probability[:2] - 0.3).all()
    assert left.probability[2] > none.probability[2] - 0.1
    assert left.probability[3].item() == pytest.approx(none.probability[0].item())
    again = ranked_ffn_neurons(bridge, other, ["log_prob_increase"], 30)["log_prob_increase"]
    both = set(again.tolist()) & set(ranked["log_prob_increase"].tolist())
    assert overlap(ranked["log_prob_increase"], again) == pytest.approx(len(both) / 30)


def test_an_edit_is_a_matrix_added_to_the_weights_and_leaves_them_alone(model, tokenizer, known):
    prompts = [
        prompt_of(known, text) for text in ("The capital of France is", "The capital of Japan is")
    ]
    tokens = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer.encode(prompt.text)] for prompt in prompts]
    )
    (rome,) = tokenizer.encode(" Rome")
    new = torch.tensor([rome, rome])
    weight = model.transformer.h[0].mlp.c_proj.weight
    before = weight.clone()
    edits = fit_edits(model, 0, tokens, new, length=2.0)
    assert torch.equal(weight, before)
    assert (edits.flatten(1).norm(dim=1) <= 2.0 + 1e-5).all()
    short = fit_edits(model, 0, tokens, new, length=0.3)
    assert torch.allclose(short.flatten(1).norm(dim=1), torch.tensor(0.3))  # and no further
    owners = torch.tensor([1, 0])
    found = probabilities_with(model, tokenizer, 0, edits, prompts[::-1], owners, new)
    for row, place in ((0, 1), (1, 0)):
        with torch.no_grad():
            weight.copy_(before + edits[place])
            truly = model(tokens[place : place + 1]).logits[0, -1].softmax(-1)[rome]
            weight.copy_(before)
        assert found[row].item() == pytest.approx(truly.item(), abs=1e-5)
    assert (found > 0.5).all()
    with pytest.raises(RuntimeError), edited(model, 0, edits):
        raise RuntimeError
    with torch.no_grad():
        assert model(tokens).logits[0, -1].softmax(-1)[rome] < 0.1


def test_a_score_explains_what_it_determines_and_adds_nothing_to_a_layer_that_does():
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(40, 6, generator=generator)
    noise = torch.rand(40, 6, generator=generator)
    layer = torch.arange(6.0).square().expand(40, 6)
    assert explained(3 * score + 1, [score], by_layer=False) == pytest.approx(1)
    assert explained(layer, [], by_layer=True) == pytest.approx(1)
    assert explained(noise, [score], by_layer=False) < 0.1
    both = explained(layer + score, [score], by_layer=True)
    assert both == pytest.approx(1)
    assert both - explained(layer + score, [], by_layer=True) > 0.001
    twice = torch.ones(40)
    twice[:5] = 2
    repeated = [torch.cat([values, values[:5]]) for values in (noise, score)]
    weighed = explained(noise, [score], by_layer=True, weights=twice)
    assert weighed == pytest.approx(explained(repeated[0], [repeated[1]], by_layer=True))
    correlations = rank_correlations(score, score.exp())
    assert torch.allclose(correlations, torch.ones(40, dtype=torch.float64))
    assert torch.allclose(rank_correlations(score, -score), -correlations)


def test_the_page_shows_what_was_measured():
    script = runpy.run_path(str(DOCS / "critics.py"))
    facts = json.loads((DOCS / "pages" / "critics.json").read_text(encoding="utf-8"))
    page = (DOCS / "pages" / "critics.md").read_text(encoding="utf-8")
    for part, tables in script["TABLES"].items():
        for table in tables:
            assert table(facts[part]) in page, table.__name__
    text = re.sub(r"\s+", " ", page)
    for sentence in script["sentences"](facts):
        assert sentence in text, sentence
