"""Neuron cards: each part by its definition, on a planted circuit, and as text and files."""

import json
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import (
    FAMILIES,
    TOKENS,
    bridge_of,
    count_forward_passes,
    hooked_of,
    hugging_face_model,
    leaving_the_random_state,
    needs_hooked_transformer,
    own_bridge_of,
    slow,
)
from hypothesis import given
from hypothesis import strategies as st
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_neuron_attr import (
    AttnNeuron,
    FFNNeuron,
    Head,
    InputError,
    attribute,
    attribute_all,
    neuron_card,
    project,
    projection_index,
    value_neurons,
)

TARGET = 7
LAST = len(TOKENS) - 1


def attributed(model, *, top=60, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # folded value biases
        return attribute(model, TOKENS, **{"target": TARGET, "top": top, **options})


def near(value, tolerance=1e-4):
    return pytest.approx(value, abs=tolerance, rel=tolerance)


# --- by definition ----------------------------------------------------------------------------


class Definition:
    """Frozen norms, subkeys and heads in float64, one number at a time."""

    def __init__(self, model, result, position=LAST):
        self.host, self.position = result.host, position
        with torch.no_grad():
            _, self.cache = model.run_with_cache(torch.tensor([TOKENS]))

    def at(self, name, layer):
        return self.cache[f"blocks.{layer}.{name}"][0, self.position].double()

    def stream(self, kind, layer):
        x = self.at("hook_resid_pre", layer)
        after = kind == "ffn" and not self.host.parallel
        return x + self.at("hook_attn_out", layer) if after else x

    def normed(self, kind, layer, x, frozen):
        """What the sub-layer would read of x with the scale of its norm as it is for ``frozen``."""
        norm = self.host.attn_norm(layer) if kind == "attn" else self.host.ffn_norm(layer)
        if norm.kind == "none":
            return x
        d = len(x)
        centre = self.host.norm == "layer_norm"
        mean = float(frozen.sum()) / d if centre else 0.0
        variance = sum((float(each) - mean) ** 2 for each in frozen) / d
        x = x - float(x.sum()) / d if centre else x
        gain = torch.ones(d) if norm.gain is None else norm.gain
        bias = torch.zeros(d) if norm.bias is None else norm.bias
        return x / (variance + self.host.eps) ** 0.5 * gain.double() + bias.double()

    def inputs(self, layer):
        """Every pre-activation of a layer: (kind, head, index, input), subkey."""
        host = self.host
        W_V = host.W_V(layer)
        for group in range(len(W_V)):
            for index in range(host.d_head):
                head = group * host.n_heads // len(W_V)
                yield ("attn", head, index, "v"), W_V[group, :, index].double()
        W_gate = host.W_gate(layer)
        for index in range(host.d_mlp):
            if W_gate is not None:
                yield ("ffn", None, index, "gate"), W_gate[:, index].double()
            name = "pre" if W_gate is None else "up"
            yield ("ffn", None, index, name), host.W_in(layer)[:, index].double()

    def hooked(self, layer, kind, head, index, name):
        """The pre-activation as the model's own hooks see it."""
        if kind == "attn":
            v = self.at("attn.hook_v", layer)
            return float(v[head * len(v) // self.host.n_heads, index])
        return float(
            self.at("mlp.hook_pre_linear" if name == "up" else "mlp.hook_pre", layer)[index]
        )

    def written(self, kind, layer, u):
        """A part of a sub-layer's output as it is in the residual stream."""
        post = self.host.post_norm(layer, kind)
        if post is not None:
            name = "ln1" if kind == "attn" else "ln2"
            post_name = f"{name}_post.hook_scale"
            if f"blocks.{layer}.{post_name}" not in self.cache:  # TransformerLens 3.9's OLMo 2
                post_name = f"{name}.hook_scale"
            u = u * post.gain.double() / self.at(post_name, layer)
        return u.double() * self.host.residual_scale

    def effects(self, u, layers_of):
        """How far each later pre-activation moves if u is added under a frozen norm."""
        found = {}
        for layer in range(self.host.n_layers):
            for place, subkey in self.inputs(layer):
                kind = place[0]
                if layer >= layers_of[kind]:
                    x = self.stream(kind, layer)
                    before = float(self.normed(kind, layer, x, x) @ subkey)
                    after = float(self.normed(kind, layer, x + u, x) @ subkey)
                    found[layer, *place] = after - before
        return found


def key_of(row):
    head = None if pd.isna(row.head) else int(row.head)
    return row.layer, row.kind, head, row.index_, row.input


def rows_of(table):
    return [*table.rename(columns={"index": "index_"}).itertuples()]


NEURONS = [FFNNeuron(0, 3), AttnNeuron(1, 1, 2, 2), AttnNeuron(1, 0, 4)]


# one of each kind of block by default
BLOCKS = ["gpt2", "qwen3", "neox-parallel", "gemma2"]


@pytest.mark.parametrize("neuron", NEURONS, ids=str)
@pytest.mark.parametrize(
    "family", [*BLOCKS, *slow(*[name for name in FAMILIES if name not in BLOCKS])]
)
def test_effects_on_later_neurons_are_their_definition(family, neuron):
    model = bridge_of(family)
    result = attributed(model, top=5)
    card = neuron_card(result, neuron, top=10_000)
    definition = Definition(model, result)
    if isinstance(neuron, FFNNeuron):
        u = result.captured.mlp_post[0, 3] * result.host.W_out(0)[3]
        u = definition.written("ffn", 0, u)
        reach = {"attn": 1, "ffn": 1}
    else:
        z = result.attns[1].coefficients()[neuron.head, :, neuron.index]
        coefficient = z.sum() if neuron.source_pos is None else z[neuron.source_pos]
        u = coefficient * result.host.W_O(1)[neuron.head, neuron.index]
        u = definition.written("attn", 1, u)
        reach = {"attn": 2, "ffn": 2 if result.host.parallel else 1}
    wanted = definition.effects(u.detach().double(), reach)
    found = {key_of(row): row for row in rows_of(card.downstream)}
    assert found.keys() == wanted.keys()
    for key, effect in wanted.items():
        row = found[key]
        assert row.effect == near(effect, 2e-5)
        assert row.product * card.coefficient == near(row.effect)
        layer, kind, *place = key
        assert row.pre_activation == near(definition.hooked(layer, kind, *place))
        assert row.share == near(row.effect / row.pre_activation)
        if kind == "ffn":
            post = float(definition.at("mlp.hook_post", layer)[place[1]])
            assert row.coefficient == near(post)
            assert pd.isna(row.source_pos)
        else:
            assert row.source_pos == LAST
    sizes = card.downstream["effect"].abs().tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert neuron_card(result, neuron, top=4).downstream.equals(card.downstream.head(4))


@pytest.mark.parametrize("position", [LAST, 2])
@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "bigcode", "neox-parallel", "gptj", "gemma", "olmo2"]
)
def test_heads_carry_a_contribution_on_as_defined(family, position):
    model = bridge_of(family, dtype=torch.float64)
    result = attributed(model, top=5)
    host = result.host
    definition = Definition(model, result, position)
    card = neuron_card(result, "L0.N5", position=position, tokens=3, top=100)
    u = definition.at("mlp.hook_post", 0)[5] * host.W_out(0)[5].double()
    u = definition.written("ffn", 0, u)
    gain = torch.ones(host.d_model) if host.final_gain is None else host.final_gain
    found = {(row.layer, row.head): row for row in card.heads.itertuples()}
    assert found.keys() == {(layer, head) for layer in (1, 2) for head in range(host.n_heads)}
    for (layer, head), row in found.items():
        x = definition.stream("attn", layer)
        read = definition.normed("attn", layer, u, x)
        read -= definition.normed("attn", layer, 0 * u, x)  # no bias: it belongs to no neuron
        W_V, W_O = host.W_V(layer), host.W_O(layer)
        group = head * len(W_V) // host.n_heads
        carried = torch.zeros(host.d_model).double()
        for index in range(host.d_head):
            carried += (read @ W_V[group, :, index]) * W_O[head, index]
        carried = definition.written("attn", layer, carried)
        centred = carried - carried.mean() if host.norm == "layer_norm" else carried
        logits = (centred / result.out.norm_scale * gain) @ host.W_U
        order = logits.argsort(descending=True).tolist()
        assert row.raises == [f"<{token}>" for token in order[:3]]
        assert row.lowers == [f"<{token}>" for token in order[:-4:-1]]
        assert row.raised_by == near(logits[order[:3]].tolist(), 1e-6)
        assert row.lowered_by == near(logits[order[:-4:-1]].tolist(), 1e-6)
        assert row.norm == near(float(carried.norm()), 1e-6)
        away = (logits - logits.mean()).abs().max() / logits.std(correction=0)
        assert row.readability == near(float(away), 1e-6)
        pattern = definition.cache[f"blocks.{layer}.attn.hook_pattern"]
        assert row.attention == near(float(pattern[0, head, LAST, position]), 1e-6)
    assert card.heads["readability"].is_monotonic_decreasing
    chosen = neuron_card(result, "L0.N5", position=position, tokens=3, head="L2.H1").heads
    assert [(row.layer, row.head) for row in chosen.itertuples()] == [(2, 1)]
    assert chosen.loc[0, "raised_by"] == near(found[2, 1].raised_by, 1e-9)


def test_what_a_head_carries_is_what_it_writes_if_all_it_reads_is_carried(tiny_model):
    """Through its norm, W_V and W_O the whole stream is the head's own output, less the biases."""
    from tl_neuron_attr.cards.onward import carried_by_heads

    result = attributed(tiny_model)
    host, captured = result.host, result.captured
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(torch.tensor([TOKENS]))
        for layer in range(host.n_layers):
            x = captured.resid_pre[layer]
            found = carried_by_heads(host, captured, layer, x)
            norm, b_V = host.attn_norm(layer), host.b_V(layer)
            v = cache[f"blocks.{layer}.attn.hook_v"][0, -1]
            v = v if b_V is None else v - b_V
            if norm.bias is not None:
                v = v - torch.einsum("m,gmk->gk", norm.bias, host.W_V(layer))
            for head in range(host.n_heads):
                wanted = v[head * len(v) // host.n_heads] @ host.W_O(layer)[head]
                assert torch.allclose(found[head], wanted, atol=1e-5)


@pytest.mark.parametrize("neuron", NEURONS, ids=str)
def test_score_coefficient_and_norms_are_those_of_the_result(tiny_model, neuron):
    result = attributed(tiny_model)
    card = neuron_card(result, neuron)
    if isinstance(neuron, AttnNeuron) and neuron.source_pos is None:
        table = result.neurons("attn", by_source=False)
        everything = attributed(tiny_model, top=1000).neurons("attn", by_source=False)
        place = dict(layer=neuron.layer, head=neuron.head, index=neuron.index)
    else:
        everything = attributed(tiny_model, top=10_000).neurons(card.to_dict()["kind"])
        table = result.neurons(card.to_dict()["kind"])
        place = {name: value for name, value in vars(neuron).items() if value is not None}

    def of(table):
        same = pd.Series(True, index=table.index)
        for name, value in place.items():
            same &= table[name] == value
        return table[same]

    (row,) = of(everything).itertuples()
    assert card.score == near(row.score, 1e-5)
    assert card.coefficient == near(row.coefficient, 1e-5)
    assert card.total == len(everything)
    assert card.ranked == len(table)
    assert card.rank == (row.rank if len(of(table)) else None)
    subvalue = (
        result.host.W_out(neuron.layer)[neuron.index]
        if isinstance(neuron, FFNNeuron)
        else result.host.W_O(neuron.layer)[neuron.head, neuron.index]
    )
    assert card.subvalue_norm == near(float(subvalue.norm()))
    assert card.contribution_norm == near(abs(card.coefficient) * float(subvalue.norm()))


def test_every_ranked_neuron_has_its_rank(tiny_model):
    result = attributed(tiny_model, top=7)
    for ranked in (result.ffn_neurons, result.attn_neurons):
        for place, neuron in enumerate(ranked.neurons()):
            assert neuron_card(result, neuron, top=1).rank == place + 1
    row = result.neurons("attn", by_source=False).iloc[3]
    free = AttnNeuron(int(row["layer"]), int(row["head"]), int(row["index"]))
    assert neuron_card(result, free).rank == 4


@pytest.mark.parametrize("family", list(FAMILIES))
def test_inputs_are_the_models_own_pre_activations(family):
    model = bridge_of(family)
    result = attributed(model, top=5)
    definition = Definition(model, result, 3)
    inputs = neuron_card(result, "L1.N6", position=3).inputs
    gated = result.host.W_gate(1) is not None
    assert inputs["input"].tolist() == (["gate", "up"] if gated else ["pre"])
    for row in inputs.itertuples():
        assert row.value == near(definition.hooked(1, "ffn", None, 6, row.input))
        weights = result.host.W_gate if row.input == "gate" else result.host.W_in
        subkey, norm = weights(1)[:, 6], result.host.ffn_norm(1)
        gained = subkey * (1 if norm.gain is None else norm.gain)
        if result.host.norm == "layer_norm":
            gained = gained - gained.mean()
        assert row.subkey_norm == near(float(subkey.norm()))
        assert row.gained_norm == near(float(gained.norm()))
    (row,) = neuron_card(result, "L2.H2.D1@3").inputs.itertuples()
    assert row.value == near(definition.hooked(2, "attn", 2, 1, "v"))
    assert row.input == "v"


def test_the_sources_of_an_attention_neuron_add_up_to_the_position_free_one(tiny_model):
    result = attributed(tiny_model)
    free = neuron_card(result, "L1.H2.D3")
    one = neuron_card(result, "L1.H2.D3@4")
    assert free.sources.equals(one.sources)
    sources = free.sources
    assert sources["source_pos"].tolist() == list(range(len(TOKENS)))
    assert sources["attention"].sum() == near(1)
    assert (sources["attention"] * sources["v"]).tolist() == near(sources["coefficient"].tolist())
    assert sources["coefficient"].sum() == near(free.coefficient)
    assert one.coefficient == near(sources.loc[4, "coefficient"])
    assert one.score == near(sources.loc[4, "score"])
    assert one.inputs.loc[0, "value"] == near(sources.loc[4, "v"])
    assert pd.isna(free.inputs.loc[0, "value"])
    assert len(neuron_card(result, "L1.N3").sources) == 0


# --- what it says -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(3))
def test_the_tokens_said_to_be_raised_are_raised(tiny_gpt2, layer):
    result = attributed(tiny_gpt2)
    signs = set()
    for index in range(12):
        card = neuron_card(result, FFNNeuron(layer, index), tokens=4)
        signs.add(card.coefficient > 0)
        base = result.ffns[layer].base
        added = result.ffns[layer].vectors(torch.tensor([index]))[0]
        with torch.no_grad():
            change = result.out.logits(base + added) - result.out.logits(base)
        for row in card.ends.itertuples():
            assert float(change[row.id]) == near(card.coefficient * row.logit, 1e-5)
            assert row.raised == (card.coefficient * (1 if row.end == "top" else -1) > 0)
        raised = card.ends[card.ends["raised"]]["id"].tolist()
        assert raised == change.topk(4).indices.tolist()
    assert signs == {True, False}


@pytest.mark.parametrize("neuron", ["L1.N5", "L2.H1.D3@2"])
def test_an_index_says_what_a_projection_does(tiny_model, tmp_path, neuron, monkeypatch):
    index = projection_index(tiny_model, tmp_path, k=6)
    plain, indexed = attributed(tiny_model), attributed(tiny_model, index=index)
    wanted, found = neuron_card(plain, neuron, tokens=6), neuron_card(indexed, neuron, tokens=6)
    pd.testing.assert_frame_equal(found.ends, wanted.ends, atol=1e-4)
    assert found.readability == near(wanted.readability)
    more = neuron_card(indexed, neuron, tokens=8)  # more than it holds
    assert more.ends.groupby("end").size().tolist() == [8, 8]


def test_readability_is_how_far_an_end_stands_out(tiny_model):
    result = attributed(tiny_model)
    vectors = torch.randn(5, result.host.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ends = project(result.out, vectors)
        logits = result.out.logits(vectors) - result.out.logits(0 * vectors)
    away = (logits - logits.mean(-1, keepdim=True)).abs().amax(-1)
    assert torch.allclose(ends.mean, logits.mean(-1), atol=1e-5)
    assert torch.allclose(ends.spread, logits.std(-1, correction=0), atol=1e-5)
    assert torch.allclose(ends.readability, away / logits.std(-1, correction=0), atol=1e-4)
    with torch.no_grad():
        for factor in (-3.0, 1e-3):  # neither sign nor size matters
            again = project(result.out, factor * vectors)
            assert torch.allclose(again.readability, ends.readability, rtol=1e-3)
        assert project(result.out, 0 * vectors).readability.tolist() == [0.0] * 5


# --- what set it off --------------------------------------------------------------------------


@pytest.mark.parametrize("neuron", ["L2.N7", "L2.H1.D3@2"])
def test_shares_are_the_query_scores_by_the_neurons_own(tiny_model, neuron):
    result = attributed(tiny_model)
    card = neuron_card(result, neuron)
    layers = result.query_layers(neuron)
    assert card.query_layers["score"].tolist() == near(layers["score"].tolist(), 1e-5)
    assert card.query_layers["share"].sum() == near(1)
    assert (card.query_layers["share"] * card.score).tolist() == near(layers["score"].tolist())
    best = card.query_neurons
    says = result.query_neurons(1000, "attn", neuron, tokens=10)
    merged = best.merge(says, on=["kind", "layer", "head", "index", "source_pos"])
    assert len(merged) and (merged["raises_x"] == merged["raises_y"]).all()
    assert best["share"].is_monotonic_decreasing and len(best) == 10
    for kind in ("ffn", "attn"):
        everything = result.query_neurons(10_000, kind, neuron)
        merged = best.merge(everything, on=["kind", "layer", "head", "index", "source_pos"])
        assert len(merged) == (best["kind"] == kind).sum()
        assert merged["score_x"].tolist() == near(merged["score_y"].tolist(), 1e-5)
        # and no other of the kind has a larger share
        shares = everything["score"] / card.score
        n_larger = int((shares > best["share"].min() + 1e-6).sum())
        assert n_larger <= len(merged)


def test_a_position_free_neuron_is_set_off_at_each_source_by_its_part(tiny_gpt2):
    result = attributed(tiny_gpt2)
    card = neuron_card(result, "L2.H1.D3")
    wanted = torch.zeros(2 * 3 + 2).double()
    for place in range(len(TOKENS)):
        one = neuron_card(result, f"L2.H1.D3@{place}")
        if len(one.query_layers):
            share = torch.tensor(one.query_layers["share"].tolist()).double()
            wanted += share * one.coefficient / card.coefficient
    assert card.query_layers["share"].tolist() == near(wanted.tolist())
    assert card.query_layers["score"].tolist() == near((wanted * card.score).tolist())


def test_an_ill_conditioned_neuron_has_no_shares_and_says_so(tiny_gpt2):
    result = attributed(tiny_gpt2, top=10_000)
    values = result.query_values("ffn", top_values=10_000)
    bad = values[values["ill_conditioned"]].iloc[0]
    card = neuron_card(result, FFNNeuron(int(bad["layer"]), int(bad["index"])))
    assert len(card.query_layers) == len(card.query_neurons) == 0
    assert "ill-conditioned" in card.notes[0]
    assert "What set it off" not in str(card)


# --- where it is largest ----------------------------------------------------------------------


PROMPTS = [(3, 17, 5), TOKENS, (8, 8, 2, 40), (22, 1), (5, 40, 8, 22, 3, 17, 9)]


@pytest.mark.parametrize("neuron", ["L1.N5", "L1.H1.D2@1", "L1.H1.D2"])
@pytest.mark.parametrize("against", [None, 9])
def test_prompts_are_ranked_by_the_neurons_own_scores(tiny_model, neuron, against):
    results = attribute_all(tiny_model, PROMPTS, target=[7, 3, 5, 7, 11], against=against, top=2)
    result = attributed(tiny_model)
    table = neuron_card(result, neuron, prompts=results).prompts
    assert table["score"].is_monotonic_decreasing
    assert sorted(table["prompt_id"]) == ["0", "1", "2", "3", "4"]
    for row in table.itertuples():
        each = results[int(row.prompt_id)]
        n_pos = len(each.captured.prompt.tokens)
        if neuron == "L1.N5":
            chosen = [FFNNeuron(1, 5)]
        else:
            chosen = [AttnNeuron(1, 1, 2, place) for place in range(n_pos)]
        (found,) = value_neurons(each.host, each.captured, each.out, each.target, chosen)
        best = int(found.score.argmax())
        if neuron == "L1.H1.D2":
            free = attributed_as(each).neurons("attn", by_source=False)
            same = (free["layer"] == 1) & (free["head"] == 1) & (free["index"] == 2)
            assert row.score == near(free[same]["score"].item(), 1e-5)
            assert row.coefficient == near(free[same]["coefficient"].item(), 1e-5)
        else:
            assert row.score == near(float(found.score[best]), 1e-5)
            assert row.coefficient == near(float(found.coefficient[best]), 1e-5)
        assert pd.isna(row.source_pos) if neuron == "L1.N5" else row.source_pos == best
        assert row.target == each.target.text
    first = neuron_card(result, neuron, prompts=results, top=2).prompts
    pd.testing.assert_frame_equal(first, table.head(2))


def attributed_as(result):
    """The same question with every neuron ranked."""
    against = None if result.target.against is None else result.target.against.id
    return attribute(
        result.host.model,
        result.captured.prompt.tokens,
        target=result.target.id,
        against=against,
        top=10_000,
    )


def test_a_small_budget_and_a_mixed_set_change_nothing(tiny_gpt2):
    results = attribute_all(tiny_gpt2, PROMPTS, target=7, top=2)
    results += attribute_all(tiny_gpt2, PROMPTS[:2], target=7, against=3, top=2)
    result = attributed(tiny_gpt2)
    wanted = neuron_card(result, "L1.H1.D2@1", prompts=results).prompts
    assert len(wanted) == 7
    tight = [replace(each, out=replace(each.out, budget=2000)) for each in results]
    pd.testing.assert_frame_equal(
        neuron_card(result, "L1.H1.D2@1", prompts=tight).prompts, wanted, atol=1e-6
    )


# --- a planted circuit ------------------------------------------------------------------------


@leaving_the_random_state
def planted_model(family="gpt2"):
    """L0.N7 writes a note where token 5 is; L1.H1.D2 and L2.N11 read it, the head says TARGET."""
    class_name, config = FAMILIES[family]
    hf = hugging_face_model(class_name, config(), scale=0.02)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)))[0]
    basis = basis - basis.mean(1, keepdim=True)  # a LayerNorm sees no mean
    cue, note, answer = basis[:3]
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "bias" in name:
                parameter.zero_()
            elif "ln_" in name:
                parameter.fill_(1.0)
        first, second, third = hf.transformer.h
        for place, token in enumerate(TOKENS):
            hf.transformer.wte.weight[token] = 2 * basis[10 + place]
        hf.transformer.wte.weight[TOKENS[2]] = 2 * cue
        hf.transformer.wte.weight[TARGET] = 2 * answer
        first.mlp.c_fc.weight[:, 7] = 2 * cue
        first.mlp.c_proj.weight[7] = 2 * note
        second.attn.c_attn.weight[:, 2 * 24 + 8 + 2] = 3 * note
        second.attn.c_proj.weight[8 + 2] = 3 * answer
        third.mlp.c_fc.weight[:, 11] = 2 * note
        third.mlp.c_proj.weight[11] = 2 * answer
    return build_bridge_from_module(
        hf, class_name, hf_config=hf.config, dtype=torch.float32, device="cpu"
    ).eval()


def test_the_card_of_a_planted_query_neuron_shows_what_was_planted():
    result = attribute(planted_model(), TOKENS, target=TARGET, top=50)
    card = neuron_card(result, "L0.N7", position=2)
    first, second = rows_of(card.downstream)[:2]
    assert (first.kind, first.layer, first.head, first.index_, first.source_pos) == (
        *("attn", 1, 1, 2, 2),
    )
    assert (second.kind, second.layer, second.index_) == ("ffn", 2, 11)
    assert abs(second.effect) > 10 * abs(card.downstream.loc[2, "effect"])
    head = card.heads.loc[0]
    assert (head["layer"], head["head"]) == (1, 1)
    assert head["raises"][0] == f"<{TARGET}>"
    assert head["readability"] > 0.95 * 60**0.5  # one token of 61 alone
    embedding = card.query_layers.set_index("kind").loc["embed", "share"]
    assert embedding > 0.9
    # at the read position it does not fire
    there = neuron_card(result, "L0.N7")
    assert abs(there.coefficient) < 0.1 * card.coefficient
    # and the head's neuron, seen from the other end, was set off by it
    value = neuron_card(result, "L1.H1.D2@2")
    assert value.query_neurons.loc[0, ["kind", "layer", "index", "position"]].tolist() == [
        *("ffn", 0, 7, 2),
    ]
    assert value.ends.loc[0, "token"] == f"<{TARGET}>"
    assert value.rank == 1


# --- kinds of model and of request ------------------------------------------------------------


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel", "gptj"])
def test_both_classes_give_the_same_card(family):
    for neuron in ("L0.N3", "L1.H1.D2@3", "L1.H1.D2"):
        ours, theirs = (
            neuron_card(attributed(make(family)), neuron, top=100_000, tokens=3)
            for make in (bridge_of, hooked_of)
        )
        assert ours.coefficient == near(theirs.coefficient)
        assert ours.score == near(theirs.score)
        ids = ["kind", "layer", "head", "index", "source_pos", "input"]
        merged = ours.downstream.merge(theirs.downstream, on=ids)
        assert len(merged) == len(ours.downstream) == len(theirs.downstream)
        assert (merged["effect_x"] - merged["effect_y"]).abs().max() < 1e-4
        assert (merged["pre_activation_x"] - merged["pre_activation_y"]).abs().max() < 1e-4
        merged = ours.heads.merge(theirs.heads, on=["layer", "head"])
        assert len(merged) == len(ours.heads) == len(theirs.heads)
        assert (merged["readability_x"] - merged["readability_y"]).abs().max() < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"convention": "published"},
        {"convention": "recomputed"},
        {"against": 3},
        {"dtype": torch.float64},
        {"position": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("neuron", ["L1.N3", "L1.H1.D2@3", "L1.H1.D2"])
def test_every_kind_of_result_has_cards(tiny_model, options, neuron):
    result = attributed(tiny_model, **options)
    card = neuron_card(result, neuron, prompts=[result])
    assert card.score == near(card.prompts.loc[0, "score"], 1e-5) or card.neuron.source_pos
    plain = neuron_card(attributed(tiny_model, position=options.get("position")), neuron)
    assert card.coefficient == near(plain.coefficient)
    wanted = plain.downstream["effect"].tolist()
    assert card.downstream["effect"].tolist() == near(wanted)
    json.dumps(card.to_dict(), allow_nan=False)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_narrow_weights_are_multiplied_in_float32(family):
    result = attributed(bridge_of(family, dtype=torch.bfloat16))
    for neuron in ("L1.N3", "L1.H1.D2@3", "L0.H1.D2"):
        card = neuron_card(result, neuron)
        assert card.downstream["effect"].notna().all()
        assert len(card.heads)


def test_another_position_is_that_positions_run(tiny_model):
    result = attributed(tiny_model)
    there = attributed(tiny_model, position=3)
    for neuron in ("L1.N3", "L1.H1.D2@3", "L1.H1.D2"):
        card, wanted = neuron_card(result, neuron, position=3), neuron_card(there, neuron)
        for same in (neuron_card(result, neuron, position=-3),):
            assert same.to_dict() == card.to_dict()
        assert card.coefficient == near(wanted.coefficient)
        assert (card.score, card.rank) == (None, None)
        assert card.downstream["effect"].tolist() == near(wanted.downstream["effect"].tolist())
        assert card.query_layers["share"].tolist() == near(wanted.query_layers["share"].tolist())
        assert card.query_layers["score"].isna().all()
        for name in ("layer", "index", "position", "raises", "lowers"):
            assert card.query_neurons[name].tolist() == wanted.query_neurons[name].tolist()
        assert "no score: the answer is read at position 5" in card.notes[0]
        assert "score" not in str(card).split("What")[0]


def test_a_neuron_that_is_off_says_what_it_would_carry():
    model = bridge_of("opt")  # ReLU
    result = attributed(model)
    off = int((result.captured.mlp_post[0] == 0).nonzero()[0])
    card = neuron_card(result, FFNNeuron(0, off))
    assert card.coefficient == 0 == card.score
    assert not card.ends["raised"].any()
    assert (card.downstream["effect"] == 0).all() and (card.downstream["product"] != 0).all()
    assert (card.heads["readability"] > 1).all()
    assert card.query_layers["share"].sum() == near(1)  # why it is off
    assert "the coefficient is 0: nothing is raised" in str(card)


def test_neurons_of_the_last_layer_reach_no_further(tiny_model):
    result = attributed(tiny_model)
    card = neuron_card(result, "L2.N3")
    assert len(card.downstream) == len(card.heads) == 0
    assert "What it sets off" not in str(card)
    after = neuron_card(result, "L2.H1.D2@3")
    assert set(after.downstream["kind"]) == {"ffn"} and set(after.downstream["layer"]) == {2}
    parallel = neuron_card(attributed(bridge_of("gptj")), "L2.H1.D2@3")
    assert len(parallel.downstream) == 0


def test_the_prompt_is_run_again_only_where_it_must(monkeypatch):
    model = bridge_of("gpt2")
    result = attributed(model)
    neuron_card(result, "L1.N3")
    passes = count_forward_passes(model, monkeypatch)
    neuron_card(result, "L1.N4", prompts=[result])
    neuron_card(result, f"L1.H1.D2@{LAST}")
    assert not passes
    neuron_card(result, "L1.H1.D2@3")
    neuron_card(result, "L1.H1.D2")
    assert len(passes) == 2
    neuron_card(result, "L1.N3", position=3)
    assert len(passes) == 3


# --- as text, as JSON, in files ---------------------------------------------------------------


@pytest.fixture(scope="module")
def cards():
    model = bridge_of("llama")
    result = attributed(model)
    prompts = attribute_all(model, PROMPTS, target=7, top=2)
    labels = ("L0.N3", "L1.H1.D2@3", "L1.H1.D2")
    return [neuron_card(result, label, prompts=prompts) for label in labels]


@given(width=st.integers(-5, 200))
def test_no_line_is_longer_than_asked(cards, width):
    for card in cards:
        lines = card.text(width).splitlines()
        assert max(map(len, lines)) <= max(60, width)
        assert all(line == line.rstrip() for line in lines)


def test_a_card_reads_from_top_to_bottom(cards):
    for card in cards:
        assert str(card) == card.text(100)
        titles = [
            line.split(" (")[0]
            for line in str(card).splitlines()
            if line and not line.startswith(" ") and line[0].isupper()
        ]
        wanted = ["What it says", "What set it off", "What it sets off", "Through later heads"]
        wanted += ["Prompts where its score is largest"]
        if isinstance(card.neuron, AttnNeuron):
            wanted.insert(1, "Where it comes from")
        assert titles[0].startswith(str(card.neuron))
        assert [title for title in titles[1:] if not title.startswith("Note")] == wanted


def test_a_card_is_plain_values(cards):
    for card in cards:
        values = json.loads(json.dumps(card.to_dict(), allow_nan=False))
        assert values["neuron"] == str(card.neuron)
        assert values["target"] == {"id": 7, "text": "<7>", "against": None}
        assert len(values["downstream"]) == 10
        assert values["downstream"][0].keys() == set(card.downstream.columns)


def test_a_card_is_saved_whole(cards, tmp_path):
    cards[2].save(tmp_path / "card")
    names = {path.name for path in (tmp_path / "card").iterdir()}
    assert {"card.json", "card.txt", "downstream.parquet", "sources.parquet"} <= names
    table = pd.read_parquet(tmp_path / "card" / "downstream.parquet")
    pd.testing.assert_frame_equal(table, cards[2].downstream)
    cards[0].save(tmp_path / "card")  # of an FFN neuron, which has no sources
    assert not (tmp_path / "card" / "sources.parquet").exists()
    assert json.loads((tmp_path / "card" / "card.json").read_text())["neuron"] == "L0.N3"
    assert (tmp_path / "card" / "card.txt").read_text() == f"{cards[0]}\n"


# --- what cannot be asked ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neuron", "options", "message"),
    [
        ("L9.N1", {}, "there is no neuron L9.N1: the model has 3 layers of 96 FFN neurons"),
        ("L1.N96", {}, "there is no neuron L1.N96"),
        (FFNNeuron(-1, 0), {}, "there is no neuron L-1.N0"),
        ("L0.H3.D0", {}, "there is no neuron L0.H3.D0: the model has 3 layers of 3 heads of 8"),
        ("L0.H1.D0@6", {}, "source positions are 0 to 5"),
        ("L0.H1.D0@3", {"position": 2}, "source positions are 0 to 2"),
        ("heads", {}, "FFN neuron label must look like 'L9.N1234'"),
        ("L1.N1", {"head": "L3.H0"}, "there is no head L3.H0: the model has 3 layers of 3 heads"),
        ("L1.N1", {"head": "L2.H3"}, "there is no head L2.H3"),
        ("L1.N1", {"head": "H2"}, "head label must look like 'L9.H3'"),
        ("L1.N1", {"head": "L1.H0"}, "head L1.H0 cannot read L1.N1: only heads of layers 2 to 2"),
        ("L2.N1", {"head": Head(2, 0)}, "later layers, of which there are none"),
        ("L1.H0.D1", {"head": "L1.H1"}, "head L1.H1 cannot read L1.H0.D1"),
        ("L1.N1", {"position": 6}, "position 6 is out of range"),
        ("L1.N1", {"position": -7}, "position -7 is out of range"),
        ("L1.N1", {"tokens": 0}, "tokens must be at least 1"),
        ("L1.N1", {"top": 0}, "top must be at least 1"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_sentence(
    tiny_gpt2, monkeypatch, neuron, options, message
):
    result = attributed(tiny_gpt2)
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    with pytest.raises(InputError, match=message) as error:
        neuron_card(result, neuron, **options)
    assert "\n" not in str(error.value)
    assert not passes


def test_prompts_of_another_model_or_convention_are_refused(tiny_gpt2):
    result = attributed(tiny_gpt2)
    for other in (attributed(bridge_of("llama")), attributed(tiny_gpt2, convention="published")):
        with pytest.raises(InputError, match="prompts must be results of the same model"):
            neuron_card(result, "L1.N1", prompts=[other])


def test_a_model_that_changed_since_is_noticed():
    from tl_neuron_attr import IdentityError

    model = own_bridge_of("gpt2")
    result = attributed(model)
    neuron_card(result, "L1.N3")
    with torch.no_grad():
        model.blocks[1].mlp.W_in.mul_(1.1)
    with pytest.raises(IdentityError):
        neuron_card(result, "L1.N3")
