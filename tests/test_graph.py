"""The graph: by its definition, as sums, as pruned, in a circuit we planted, and as it is shown."""

import itertools
import json
import math
import re
import warnings

import networkx
import pandas as pd
import pytest
import torch
from conftest import (
    FAMILIES,
    TOKENS,
    bridge_of,
    bundled_model,
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
from typer.testing import CliRunner

from tl_neuron_attr import (
    AttnNeuron,
    FFNNeuron,
    InputError,
    attribute,
    capture_sources,
    cli,
    query_scores,
    top_query_neurons,
    value_query_graph,
    views,
)
from tl_neuron_attr.cli import options as loading
from tl_neuron_attr.graph import EDGE_COLUMNS, NODE_COLUMNS
from tl_neuron_attr.inputs import query_inputs, together
from tl_neuron_attr.reading import QueryNeurons

TARGET = 7
PROMPT = "The capital of France is"


def attributed(model, *, top=60, target=TARGET, tokens=TOKENS, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # folded value biases
        return attribute(model, tokens, target=target, top=top, **options)


def weights(graph):
    return {(edge.source, edge.target): edge.weight for edge in graph.edges}


def total_rest(node):
    return node.rest.token + node.rest.attn + node.rest.ffn + node.rest.bias


# --- a planted circuit ------------------------------------------------------------------------


@leaving_the_random_state
def planted_model():
    """L0.N7 writes, where token 5 is, what L1.H1.D2 reads; that writes what L2.N11 reads.

    L2.N11 writes the answer; so does L1.H1.D2 a little, so that it is the best of its kind.
    """
    class_name, config = FAMILIES["gpt2"]
    hf = hugging_face_model(class_name, config(), scale=0.01)
    noise = torch.randn(24, 23, generator=torch.Generator().manual_seed(1))
    # orthogonal to ones: a LayerNorm sees no mean
    basis = torch.linalg.qr(torch.cat([torch.ones(24, 1), noise], 1))[0].T[1:]
    cue, note, message, answer = basis[:4]
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "bias" in name:
                parameter.zero_()
            elif "ln_" in name:
                parameter.fill_(1.0)
        first, second, third = hf.transformer.h
        # a LayerNorm would blow up what is small: every token says something, one says the cue
        for place, token in enumerate(TOKENS):
            hf.transformer.wte.weight[token] = 2 * basis[10 + place]
        hf.transformer.wte.weight[TOKENS[2]] = 2 * cue
        hf.transformer.wte.weight[TARGET] = 2 * answer
        first.mlp.c_fc.weight[:, 7] = 2 * cue
        first.mlp.c_proj.weight[7] = 2 * note
        second.attn.c_attn.weight[:, 2 * 24 + 8 + 2] = 3 * note
        second.attn.c_proj.weight[8 + 2] = 3 * message + 0.3 * answer
        third.mlp.c_fc.weight[:, 11] = 2 * message
        third.mlp.c_proj.weight[11] = 2 * answer
    return build_bridge_from_module(
        hf, class_name, hf_config=hf.config, dtype=torch.float32, device="cpu"
    ).eval()


PATH = ["token@2", "L0.N7@2", "L1.H1.D2@2>5", "L2.N11@5", "answer"]


@pytest.mark.parametrize("convention", ["exact", "published"])
def test_each_neuron_of_a_planted_circuit_comes_first_and_the_graph_is_exactly_its_path(convention):
    result = attributed(planted_model(), convention=convention)
    assert str(result.ffn_neurons.neurons()[0]) == "L2.N11"
    assert str(result.attn_neurons.neurons()[0]) == "L1.H1.D2@2"
    assert result.query_neurons(1, "ffn", "attn").loc[0, ["layer", "index"]].tolist() == [0, 7]

    graph = value_query_graph(result, depth=3)
    assert sorted(node.id for node in graph.nodes) == sorted(PATH)
    assert set(weights(graph)) == set(itertools.pairwise(PATH))
    assert [node.role for node in graph.nodes] == ["answer", "value", "query", "query", "token"]
    assert [node.step for node in graph.nodes] == [0, 1, 2, 3, 4]
    for node in graph.nodes[1:-1]:  # each link carries most of what comes after it
        assert node.explained > 0.8 * node.handed_down > 0
    assert graph.answer.reached > 0.5


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_each_step_of_depth_adds_one_link_of_the_planted_path(depth):
    graph = value_query_graph(attributed(planted_model()), depth=depth)
    assert [node.id for node in graph.nodes] == PATH[::-1][: 2 + depth]
    assert [edge.source for edge in graph.edges] == PATH[::-1][1 : 2 + depth]
    assert graph.nodes[-1].handed_down == 0


def test_from_attention_value_neurons_the_path_is_found_in_two_steps():
    result = attributed(planted_model())
    graph = value_query_graph(result, "attn", kind="ffn", depth=2)
    assert [node.id for node in graph.nodes] == [
        "answer",
        "L1.H1.D2@2>5",
        "L0.N7@2",
        "token@2",
    ]
    assert value_query_graph(result, "ffn", kind="ffn").nodes[1].rest.attn > 0


# --- the definition ---------------------------------------------------------------------------


class Definition:
    """The graph as written down: one neuron, one input, one dot product at a time, in float64."""

    def __init__(self, result, model):
        self.result, self.host = result, result.host
        self.published = result.convention == "published"
        with torch.no_grad():
            _, self.cache = model.run_with_cache(torch.tensor([result.captured.prompt.tokens]))

    def at(self, name, layer, position):
        return self.cache[f"blocks.{layer}.{name}"][0, position].double()

    def neurons_before(self, layer, sees_attn, position, kinds):
        """(node, vector) of every earlier neuron that writes at ``position``."""
        for below in range(layer + sees_attn):
            if "attn" in kinds:
                pattern = self.cache[f"blocks.{below}.attn.hook_pattern"][0, :, position].double()
                v = self.cache[f"blocks.{below}.attn.hook_v"][0].double()
                W_O = self.host.W_O(below).double()
                for head, source, index in itertools.product(
                    range(len(pattern)), range(position + 1), range(v.shape[2])
                ):
                    m = pattern[head, source] * v[source, head * v.shape[1] // len(pattern), index]
                    name = f"{AttnNeuron(below, head, index, source)}>{position}"
                    yield name, m * W_O[head, index]
            if "ffn" in kinds and below < layer:
                post, W_out = self.at("mlp.hook_post", below, position), self.host.W_out(below)
                for index in range(len(post)):
                    yield f"{FFNNeuron(below, index)}@{position}", post[index] * W_out[index]

    def shares(self, neuron, position, kinds):
        """What feeds one neuron: share by input; shares in sum; None if it is ill-conditioned."""
        host, layer = self.host, neuron.layer
        ffn = isinstance(neuron, FFNNeuron)
        where = position if ffn else neuron.source_pos
        sees_attn = ffn and not host.parallel
        x = self.at("hook_resid_pre", layer, where)
        if sees_attn:
            x = x + self.at("hook_attn_out", layer, where)
        norm = host.ffn_norm(layer) if ffn else host.attn_norm(layer)
        if ffn:
            subkeys = [(host.W_in(layer)[:, neuron.index], host.b_in(layer))]
            if host.W_gate(layer) is not None:
                subkeys.append((host.W_gate(layer)[:, neuron.index], host.b_gate(layer)))
                if self.published:
                    subkeys = [(host.W_out(layer)[neuron.index], None)]
            subkeys = [(key, 0.0 if b is None else float(b[neuron.index])) for key, b in subkeys]
        else:
            W_V, b_V = host.W_V(layer), host.b_V(layer)
            group = neuron.head * len(W_V) // host.n_heads
            bias = 0.0 if b_V is None else float(b_V[group, neuron.index])
            subkeys = [(W_V[group, :, neuron.index], bias)]
        gain = 1.0 if norm.gain is None else norm.gain.double()
        layer_norm = host.norm == "layer_norm" and not self.published
        centred = x - x.mean() if host.norm == "layer_norm" else x
        scale = 1.0 if self.published else math.sqrt(float(centred.square().mean()) + host.eps)
        embed = self.at("hook_resid_pre", 0, where)
        layers = {
            "attn": [self.at("hook_attn_out", below, where) for below in range(layer + sees_attn)],
            "ffn": [self.at("hook_mlp_out", below, where) for below in range(layer)],
        }
        one_by_one, sums = {}, dict.fromkeys(("embed", "attn", "ffn", "bias"), 0.0)
        for subkey, bias in subkeys:
            subkey = subkey.double()

            def reads(q, subkey=subkey):
                q = q.double() - q.double().mean() if layer_norm else q.double()
                return float((q / scale * gain) @ subkey)

            constant = bias + (0.0 if norm.bias is None else float(norm.bias.double() @ subkey))
            constant = 0.0 if self.published else constant
            total = reads(x) + constant
            parts = {name: [reads(q) for q in vectors] for name, vectors in layers.items()}
            absolute = abs(constant) + abs(reads(embed))
            absolute += sum(abs(part) for several in parts.values() for part in several)
            if abs(total) < 0.05 * absolute and not self.published:
                return None
            worth = 1 / len(subkeys) / total
            sums["embed"] += worth * reads(embed)
            sums["bias"] += worth * constant
            for name, several in parts.items():
                sums[name] += worth * sum(several)
            for name, vector in self.neurons_before(layer, sees_attn, where, kinds):
                one_by_one[name] = one_by_one.get(name, 0.0) + worth * reads(vector)
        return {f"token@{where}": sums["embed"], **one_by_one}, sums

    def kept(self, candidates, share, most):
        """The fewest that hold ``share`` of all that is positive, at most ``most``."""
        positive = sorted(((s, name) for name, s in candidates.items() if s > 0), reverse=True)
        wanted, held, names = share * sum(s for s, _ in positive), 0.0, []
        for s, name in positive[:most]:
            if held >= wanted:
                break
            held += s
            names.append(name)
        return names, held / sum(s for s, _ in positive) if positive else 0.0

    def graph(self, values, *, kinds, share, depth, max_inputs, opposing):
        """Edges, and of each node what it hands down, the rest by kind, and the share reached."""
        neurons, live, edges, told = {}, {}, {}, {}
        for neuron, score in values:
            read_pos = self.result.captured.prompt.read_pos
            name = f"{neuron}{'@' if isinstance(neuron, FFNNeuron) else '>'}{read_pos}"
            neurons[name] = neuron, read_pos
            live[name] = edges[name, "answer"] = score
        for _ in range(depth):
            following = {}
            for name, score in live.items():
                found = self.shares(*neurons[name], kinds)
                if found is None:
                    told[name] = None
                    continue
                candidates, sums = found
                names, reached = self.kept(candidates, share, max_inputs)
                if opposing:
                    against = {q: -part for q, part in candidates.items()}
                    names = names + self.kept(against, share, max_inputs)[0]
                down, rest, _ = told.get(name, (0.0, dict.fromkeys(sums, 0.0), 0))
                drawn = dict.fromkeys(sums, 0.0)
                for q in names:
                    kind = "embed" if q[0] == "t" else "attn" if ".H" in q else "ffn"
                    drawn[kind] += candidates[q]
                    edges[q, name] = edges.get((q, name), 0.0) + score * candidates[q]
                    if kind != "embed":
                        following[q] = following.get(q, 0.0) + score * candidates[q]
                        label, position = q.replace(">", " ").rsplit(
                            " " if kind == "attn" else "@", 1
                        )
                        parse = AttnNeuron.parse if kind == "attn" else FFNNeuron.parse
                        neurons[q] = parse(label), int(position)
                rest = {key: rest[key] + score * (sums[key] - drawn[key]) for key in sums}
                told[name] = down + score, rest, reached
            live = following
        return edges, told


CASES = {
    "as it comes": {},
    "two steps": dict(depth=2, max_inputs=3),
    "three steps, both signs": dict(depth=3, max_inputs=2, opposing=True),
    "FFN inputs": dict(kind="ffn", depth=2, max_inputs=3),
    "attention inputs, much": dict(kind="attn", share=0.9, max_inputs=40),
    "FFN values": dict(of="ffn", max_inputs=6),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("convention", ["exact", "published"])
@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "neox-parallel", *slow("qwen2", "neox", "gptj")]
)
def test_the_graph_is_its_definition(family, convention, case):
    model = bridge_of(family, dtype=torch.float64)
    result = attributed(model, convention=convention)
    asked = dict(of="both", kind="both", share=0.5, depth=1, max_values=4, max_inputs=4)
    asked |= dict(opposing=False) | CASES[case]
    graph = value_query_graph(result, **asked)
    ranked = [result.ffn_neurons, *([result.attn_neurons] if asked["of"] == "both" else [])]
    scores = {
        neuron: score
        for each in ranked
        for neuron, score in zip(each.neurons(), each.score.tolist(), strict=True)
        if score > 0
    }
    values, held = [], 0.0
    for neuron, score in sorted(scores.items(), key=lambda item: -item[1]):
        if held < asked["share"] * sum(scores.values()) and len(values) < asked["max_values"]:
            values.append((neuron, score))
            held += score
    assert graph.answer.handed_down == pytest.approx(sum(scores.values()))
    assert graph.answer.reached == pytest.approx(held / sum(scores.values()))

    kinds = ("ffn", "attn") if asked["kind"] == "both" else (asked["kind"],)
    wanted, told = Definition(result, model).graph(
        values,
        kinds=kinds,
        **{name: asked[name] for name in ("share", "depth", "max_inputs", "opposing")},
    )
    # Hugging Face's RMSNorm computes in float32 even here
    near = dict(abs=1e-5, rel=1e-5) if family in ("llama", "qwen2") else dict(abs=1e-9, rel=1e-6)
    assert weights(graph).keys() == wanted.keys()
    for edge, weight in weights(graph).items():
        assert weight == pytest.approx(wanted[edge], **near)
    for node in graph.nodes[1:]:
        if node.id not in told:
            assert (node.handed_down, node.reached, graph.inputs(node.id)) == (0, None, ())
        elif told[node.id] is None:
            assert node.left_out and not graph.inputs(node.id)
        else:
            down, rest, reached = told[node.id]
            assert node.handed_down == pytest.approx(down, **near)
            found = (node.rest.token, node.rest.attn, node.rest.ffn, node.rest.bias)
            wanted_rest = (rest["embed"], rest["attn"], rest["ffn"], rest["bias"])
            assert found == pytest.approx(wanted_rest, **near)
            assert node.reached == pytest.approx(reached, **near)
            fed = sum(edge.weight for edge in graph.edges if edge.source == node.id)
            assert node.score == pytest.approx(fed)


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_a_node_hands_down_is_explained_or_told_on_every_family(family, processed):
    check_accounts(bridge_of(family, processed=processed))


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_both_classes_give_the_same_graph(family):
    found = check_accounts(hooked_of(family))
    wanted = check_accounts(bridge_of(family))
    assert weights(found) == pytest.approx(weights(wanted), abs=1e-4)


def check_accounts(model):
    result = attributed(model)
    graph = value_query_graph(result, depth=3, max_values=6, max_inputs=3, opposing=True)
    assert {node.kind for node in graph.nodes} >= {"answer", "token", "ffn", "attn"}
    for node in graph.nodes:
        size = max(1.0, abs(node.handed_down))
        assert abs(node.handed_down - node.explained - total_rest(node)) < 2e-4 * size
        entering = sum(edge.weight for edge in graph.inputs(node.id))
        assert node.explained == pytest.approx(entering, abs=1e-6)
    firsts = {edge.source: edge.weight for edge in graph.inputs("answer")}
    for ranked in (result.ffn_neurons, result.attn_neurons):
        for neuron, score in zip(ranked.neurons(), ranked.score.tolist(), strict=True):
            for name, weight in firsts.items():
                if name.startswith(f"{neuron}{'@' if ranked.kind == 'ffn' else '>'}"):
                    assert weight == pytest.approx(score)
    return graph


# --- pruning ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    """An attribution, and what is needed to ask for inputs of its value neurons."""
    result = attributed(bridge_of("llama"))
    values = [result.ffn_neurons.first(5), result.attn_neurons.first(5)]
    positions = result.attn_neurons.first(5).source_pos.tolist()
    return result, values, capture_sources(result.host, result.captured, positions)


def kept_shares(result, values, sources, **asked):
    """Of each value neuron the shares of its inputs, and what share of the whole they hold."""
    got = query_inputs(result.host, result.captured, values, sources, **asked)
    shares = [[] for _ in got.score]
    for inputs in got.inputs.values():
        scores = inputs.neurons.neurons.score.tolist()
        for value, score in zip(inputs.value.tolist(), scores, strict=True):
            shares[value].append(score / float(got.score[value]))
    for value, token in enumerate(got.token.tolist()):
        if token:
            shares[value].append(float(got.embed[value] / got.score[value]))
    return [sorted(each, reverse=True) for each in shares], got.reached.tolist()


@given(share=st.floats(0.01, 1.0), most=st.integers(1, 60))
def test_the_inputs_kept_are_the_largest_and_no_fewer_hold_the_share(found, share, most):
    result, values, sources = found
    everything, _ = kept_shares(result, values, sources, share=1.0, most=2000)
    some, reached = kept_shares(result, values, sources, share=share, most=most)
    for each, kept, held in zip(everything, some, reached, strict=True):
        total = sum(each)
        assert kept == pytest.approx(each[: len(kept)], rel=1e-5)
        assert held == pytest.approx(sum(kept) / total, rel=1e-4)
        assert len(kept) == most or held >= share - 1e-4
        assert (held - kept[-1] / total) < share + 1e-4


@given(share=st.floats(0.01, 1.0), most=st.integers(1, 80))
def test_the_value_neurons_kept_are_the_best_and_no_fewer_hold_the_share(found, share, most):
    result, _, _ = found
    ranked = torch.cat([result.ffn_neurons.score, result.attn_neurons.score])
    best = ranked[ranked > 0].sort(descending=True).values.tolist()
    graph = value_query_graph(result, share=share, max_values=most, max_inputs=1)
    drawn = [edge.weight for edge in graph.inputs("answer")]
    assert drawn == pytest.approx(best[: len(drawn)])
    reached = graph.answer.reached
    assert reached == pytest.approx(sum(drawn) / sum(best), rel=1e-4)
    assert len(drawn) == most or reached >= share - 1e-4
    assert reached - drawn[-1] / sum(best) < share + 1e-4


def test_all_of_a_share_of_1_is_everything_that_sets_a_neuron_off(found):
    result, values, sources = found
    everything, reached = kept_shares(result, values, sources, share=1.0, most=2000)
    assert reached == pytest.approx([1.0] * 10)
    assert all(each[-1] > 0 for each in everything)
    assert max(map(len, everything)) > 100


def test_a_small_budget_changes_nothing(found):
    result, values, sources = found
    wanted = query_inputs(result.host, result.captured, values, sources, most=9, opposing=True)
    got = query_inputs(
        result.host, result.captured, values, sources, most=9, opposing=True, budget=1
    )
    assert torch.allclose(got.reached, wanted.reached)
    for kind, inputs in wanted.inputs.items():
        assert got.inputs[kind].value.tolist() == inputs.value.tolist()
        neurons = got.inputs[kind].neurons
        assert neurons.neurons.neurons() == inputs.neurons.neurons.neurons()
        assert torch.allclose(neurons.neurons.score, inputs.neurons.neurons.score, rtol=1e-4)


def test_inputs_bring_what_the_sums_over_value_neurons_say(found):
    result, values, sources = found
    got = query_inputs(result.host, result.captured, values, sources, share=1.0, most=2000)
    scores = query_scores(result.host, result.captured, values, sources)
    for name in ("embed", "bias"):
        assert float(getattr(got, name).sum()) == pytest.approx(float(getattr(scores, name)))
    for name in ("attn", "ffn"):
        total = float(getattr(scores, name).sum())
        assert float(getattr(got, name).sum()) == pytest.approx(total, abs=1e-5)
    # the one query neuron that does most, over all value neurons
    against = query_inputs(
        result.host, result.captured, values, sources, share=1.0, most=2000, opposing=True
    )
    best = top_query_neurons(result.host, result.captured, scores, 3, "ffn", by_position=True)
    both = together(against.inputs["ffn"].neurons)
    assert both.neurons.neurons()[:3] == best.neurons.neurons()
    assert both.position.tolist()[:3] == best.position.tolist()
    assert torch.allclose(both.neurons.score[:3], best.neurons.score, atol=1e-5)


def test_query_neurons_have_query_scores_of_their_own():
    model = bridge_of("gpt2", dtype=torch.float64)
    result = attributed(model)
    host, captured = result.host, result.captured
    scores = result.query_scores("attn", top_values=8)
    best = top_query_neurons(host, captured, scores, 6, "ffn", by_position=True)
    assert set(best.position.tolist()) - {captured.prompt.read_pos}
    sources = capture_sources(host, captured, best.position.tolist())
    second = query_scores(host, captured, [best], sources)
    kept = second.values[0].score[~second.left_out].sum()
    handed_down = second.embed + second.attn.sum() + second.ffn.sum() + second.bias
    assert float(handed_down) == pytest.approx(float(kept))
    embed, ill = 0.0, 0
    oracle = Definition(result, model)
    columns = best.neurons.neurons(), best.position.tolist(), best.neurons.score.tolist()
    for neuron, position, score in zip(*columns, strict=True):
        found = oracle.shares(neuron, position, ())
        ill += found is None
        embed += 0.0 if found is None else score * found[1]["embed"]
    assert float(second.embed) == pytest.approx(embed)
    assert int(second.left_out.sum()) == ill
    # at the read position a query neuron and a value neuron are set off alike
    there = QueryNeurons(
        neurons=result.ffn_neurons, position=torch.full_like(result.ffn_neurons.layer, 5)
    )
    wanted = query_scores(host, captured, [result.ffn_neurons])
    assert torch.equal(query_scores(host, captured, [there]).ffn_neurons, wanted.ffn_neurons)
    with pytest.raises(InputError, match="it is not known what happened at source position"):
        query_scores(host, captured, [best])


# --- what a graph may be of -------------------------------------------------------------------


def test_a_neuron_is_a_node_for_each_position_and_one_for_both_roles():
    result = attributed(bridge_of("gpt2"))
    graph = value_query_graph(result, depth=2, max_values=20, max_inputs=12, share=1.0)
    ids = [node.id for node in graph.nodes]
    assert len(set(ids)) == len(ids)
    assert {node.role for node in graph.nodes} == {"answer", "value", "query", "both", "token"}
    by_neuron = {}
    for node in graph.nodes:
        by_neuron.setdefault(node.neuron, []).append(node.position)
    assert any(len(positions) > 1 for neuron, positions in by_neuron.items() if neuron)
    to_answer = {edge.source for edge in graph.inputs("answer")}
    feeding = {edge.source for edge in graph.edges if edge.target != "answer"}
    for node in graph.nodes[1:]:
        values = node.role in ("value", "both")
        assert values == (node.id in to_answer)
        if node.kind != "token":
            assert (node.role in ("query", "both")) == (node.id in feeding)
    # coefficients are those of the position
    _, cache = result.host.model.run_with_cache(torch.tensor([TOKENS]))
    for node in graph.nodes:
        if isinstance(node.neuron, FFNNeuron):
            post = cache[f"blocks.{node.neuron.layer}.mlp.hook_post"][0, node.position]
            assert node.coefficient == pytest.approx(float(post[node.neuron.index]), abs=1e-6)


def test_only_tokens_and_biases_set_off_attention_of_layer_0(tiny_model):
    result = attributed(tiny_model)
    graph = value_query_graph(result, "L0.H1.D2@3", share=1.0, max_inputs=9)
    assert {node.kind for node in graph.nodes} <= {"answer", "attn", "token"}
    assert {edge.source for edge in graph.edges} <= {"L0.H1.D2@3>5", "token@3"}
    node = graph.nodes[1]
    assert (node.rest.attn, node.rest.ffn) == (0, 0)
    assert node.explained + node.rest.token + node.rest.bias == pytest.approx(
        node.handed_down, abs=1e-5
    )


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_an_ffn_neuron_of_layer_0_is_fed_by_attention_only_in_sequential_blocks(family):
    result = attributed(bridge_of(family))
    graph = value_query_graph(result, FFNNeuron(0, 3), share=1.0, max_inputs=30)
    kinds = {node.kind for node in graph.nodes if node.role == "query"}
    assert kinds == (set() if result.host.parallel else {"attn"})


@pytest.mark.parametrize("options", [{"against": 3}, {"convention": "recomputed"}, {"position": 2}])
def test_contrasts_other_read_outs_and_positions(options, tiny_gpt2):
    result = attributed(tiny_gpt2, **options)
    graph = value_query_graph(result, depth=2)
    read_pos = result.captured.prompt.read_pos
    assert {node.position for node in graph.nodes if node.step == 1} == {read_pos}
    assert max(node.position for node in graph.nodes) == read_pos
    best = max(float(result.ffn_neurons.score[0]), float(result.attn_neurons.score[0]))
    assert graph.edges[0].weight == pytest.approx(best)
    for node in graph.nodes:
        assert node.handed_down == pytest.approx(node.explained + total_rest(node), abs=1e-4)
    if "against" in options:
        assert graph.answer.label == "<7> against <3>"


def test_a_prompt_of_one_token(tiny_model):
    graph = value_query_graph(attributed(tiny_model, tokens=(3,)), depth=2)
    assert {node.position for node in graph.nodes} == {0}
    assert {node.id for node in graph.nodes if node.kind == "token"} == {"token@0"}


def test_ill_conditioned_value_neurons_are_nodes_without_inputs():
    result = attributed(bridge_of("gpt2"), top=10_000)
    values = result.query_values("ffn", top_values=10_000)
    bad, good = (values[values["ill_conditioned"] == ill].iloc[0] for ill in (True, False))
    ill, sound = (FFNNeuron(int(row["layer"]), int(row["index"])) for row in (bad, good))
    graph = value_query_graph(result, [ill, sound], max_inputs=3)
    nodes = {node.neuron: node for node in graph.nodes if node.step == 1}
    assert nodes[ill].left_out and not nodes[sound].left_out
    assert graph.inputs(nodes[ill].id) == ()
    assert (nodes[ill].handed_down, nodes[ill].explained, nodes[ill].reached) == (0, 0, None)
    assert total_rest(nodes[ill]) == 0
    assert nodes[ill].score == pytest.approx(float(bad["score"]))
    alone = value_query_graph(result, sound, max_inputs=3)
    assert weights(alone) == pytest.approx(
        {edge: weights(graph)[edge] for edge in weights(alone)}, abs=1e-6
    )


def test_chosen_neurons_are_all_drawn_whatever_their_scores(tiny_gpt2):
    result = attributed(tiny_gpt2, top=10_000)
    worst = result.ffn_neurons.neurons()[-1]
    score = float(result.ffn_neurons.score[-1])
    assert score < 0
    graph = value_query_graph(result, [str(worst), "L1.H0.D3@2", worst], max_values=1)
    assert graph.of == f"{worst}, L1.H0.D3@2, {worst}"
    again = value_query_graph(result, (each for each in [worst, "L1.H0.D3@2", worst]))
    assert (again.of, again.edges) == (graph.of, graph.edges)
    assert weights(graph)[f"{worst}@5", "answer"] == pytest.approx(score, abs=1e-6)
    assert len(graph.inputs("answer")) == 2
    assert graph.answer.explained == pytest.approx(graph.answer.handed_down)
    # what sets off a neuron that lowers the answer, lowers it
    assert all(edge.weight < 0 for edge in graph.inputs(f"{worst}@5"))


def test_where_nothing_raises_the_target_there_is_the_answer_alone():
    result = attributed(planted_model(), top=5)
    for ranked in (result.ffn_neurons, result.attn_neurons):
        ranked.score.neg_()
    graph = value_query_graph(result)
    assert ([node.id for node in graph.nodes], graph.edges) == (["answer"], ())
    assert graph.answer.reached == 0
    assert list(graph.edge_table().columns) == list(EDGE_COLUMNS)
    with pytest.raises(InputError, match="edges table has no rows"):
        views.sankey(graph.node_table(), graph.edge_table())


def test_narrow_weights_and_both_dtypes(tiny_gpt2):
    narrow = attributed(bridge_of("gpt2", dtype=torch.bfloat16))
    assert len(value_query_graph(narrow, depth=2).nodes) > 10
    wide = attributed(tiny_gpt2, dtype=torch.float64)
    found, wanted = value_query_graph(wide), value_query_graph(attributed(tiny_gpt2))
    assert weights(found) == pytest.approx(weights(wanted), abs=1e-4)


def test_the_prompt_is_run_again_once_for_each_step_that_needs_other_positions(monkeypatch):
    model = own_bridge_of("gpt2")
    result = attributed(model)
    value_query_graph(result, "ffn")
    passes = count_forward_passes(model, monkeypatch)
    value_query_graph(result, "ffn")
    assert len(passes) == 0
    value_query_graph(result, "attn")
    assert len(passes) == 1
    value_query_graph(result, "attn", depth=2, kind="ffn")  # the same positions
    assert len(passes) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(share=0.0), "share must be above 0 and at most 1, got 0"),
        (dict(share=1.5), "share must be above 0 and at most 1, got 1.5"),
        (dict(share=math.nan), "share must be above 0 and at most 1, got nan"),
        (dict(depth=0), "depth must be at least 1, got 0"),
        (dict(max_values=0), "max_values must be at least 1"),
        (dict(max_inputs=-3), "max_inputs must be at least 1"),
        (dict(of="L9.N1"), "there is no neuron L9.N1"),
        (dict(of="L0.H0.D0"), "L0.H0.D0 has no source position"),
        (dict(of="heads"), "of must be 'attn', 'ffn', 'both' or neurons"),
        (dict(of=[]), "there is no value neuron to draw"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_sentence(tiny_gpt2, monkeypatch, asked, message):
    result = attributed(tiny_gpt2)
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    with pytest.raises(InputError, match=message) as error:
        value_query_graph(result, **asked)
    assert "\n" not in str(error.value)
    assert not passes


# --- tables, JSON, networkx -------------------------------------------------------------------


def test_tables_and_files_say_what_the_graph_says(tiny_gpt2, tmp_path):
    graph = value_query_graph(attributed(tiny_gpt2), depth=2, opposing=True, tokens=3)
    graph.save(tmp_path)
    nodes = pd.read_parquet(tmp_path / "nodes.parquet")
    edges = pd.read_parquet(tmp_path / "edges.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "edges.parquet",
        "graph.json",
        "nodes.parquet",
    ]
    assert list(nodes.columns) == [*NODE_COLUMNS, "raises", "lowers"]
    assert list(edges.columns) == list(EDGE_COLUMNS)
    assert nodes["id"].tolist() == [node.id for node in graph.nodes]
    assert edges["weight"].tolist() == [edge.weight for edge in graph.edges]
    for row, node in zip(nodes.itertuples(), graph.nodes, strict=True):
        assert (row.kind, row.role, row.position, row.token) == (
            node.kind,
            node.role,
            node.position,
            node.token,
        )
        assert (row.score, row.explained, row.rest_ffn) == (
            node.score,
            node.explained,
            node.rest.ffn,
        )
        assert tuple(row.raises) == node.raises
        assert pd.isna(row.layer) == (node.neuron is None)
        assert pd.isna(row.head) == (not isinstance(node.neuron, AttnNeuron))
        if node.neuron is not None:
            assert (row.layer, nodes.loc[row.Index, "index"]) == (
                node.neuron.layer,
                node.neuron.index,
            )
    plain = value_query_graph(attributed(tiny_gpt2))
    assert list(plain.node_table().columns) == list(NODE_COLUMNS)
    assert all("raises" not in node for node in plain.node_link()["nodes"])


def test_raises_and_lowers_are_those_of_the_neuron_tables(tiny_model):
    result = attributed(tiny_model)
    graph = value_query_graph(result, max_values=8, tokens=4)
    wanted = {}
    for ranked, kind in ((result.ffn_neurons, "ffn"), (result.attn_neurons, "attn")):
        table = result.neurons(kind, tokens=4)
        for neuron, raises, lowers in zip(
            ranked.neurons(), table["raises"], table["lowers"], strict=True
        ):
            wanted[neuron] = tuple(raises), tuple(lowers)
    for node in graph.nodes:
        if node.step == 1:
            assert (node.raises, node.lowers) == wanted[node.neuron]
        elif node.neuron is None:
            assert node.raises == node.lowers == ()
        else:
            assert len(node.raises) == len(node.lowers) == 4


def test_networkx_reads_the_json(tiny_gpt2):
    graph = value_query_graph(attributed(tiny_gpt2), depth=2)
    text = json.dumps(graph.node_link(), allow_nan=False)
    read = networkx.node_link_graph(json.loads(text), edges="edges")
    assert read.is_directed() and not read.is_multigraph()
    assert networkx.is_directed_acyclic_graph(read)
    assert set(read.nodes) == {node.id for node in graph.nodes}
    found = {(source, target): weight for source, target, weight in read.edges(data="weight")}
    assert found == weights(graph)
    assert read.graph["target"]["id"] == TARGET
    assert read.graph["unit"] == "nats"
    node = graph.nodes[1]
    assert read.nodes[node.id]["layer"] == node.neuron.layer
    assert read.nodes[node.id]["handed_down"] == node.handed_down
    assert "layer" not in read.nodes["answer"]


# --- the picture ------------------------------------------------------------------------------


def drawn(graph, **options):
    return views.sankey(graph.node_table(), graph.edge_table(), **options)


def test_the_diagram_has_a_bar_a_node_and_a_ribbon_an_edge(tiny_gpt2):
    graph = value_query_graph(attributed(tiny_gpt2), depth=2, opposing=True, tokens=2)
    figure = drawn(graph)
    trace = json.loads(figure.to_json())["data"][0]
    ids = [node.id for node in graph.nodes]
    link = trace["link"]
    found = [
        (ids[source], ids[target], width)
        for source, target, width in zip(link["source"], link["target"], link["value"], strict=True)
    ]
    assert found == [(edge.source, edge.target, abs(edge.weight)) for edge in graph.edges]
    signs = {
        edge.weight > 0: colour for edge, colour in zip(graph.edges, link["color"], strict=True)
    }
    assert signs[True].startswith("rgba(27, 120, 55") and signs[False].startswith("rgba(118, 42")
    for edge, colour in zip(graph.edges, link["color"], strict=True):
        assert colour == signs[edge.weight > 0]
    kinds = dict(zip([node.kind for node in graph.nodes], trace["node"]["color"], strict=True))
    assert len(set(kinds.values())) == 4
    names = [trace.name for trace in figure.data[1:]]
    assert names == ["raises", "lowers", "FFN neuron", "attention neuron", "token"]
    about = trace["node"]["customdata"][1]
    node = graph.nodes[1]
    assert f"{node.score:+.3g}" in about and f"of {node.handed_down:+.3g} nats" in about
    assert "raises" in about
    # redrawn from what was saved it is the same
    again = views.sankey(graph.node_table(), graph.edge_table())
    assert again.to_json() == figure.to_json()


def test_hostile_tokens_and_long_labels_are_shown_as_text():
    graph = value_query_graph(attributed(planted_model()), depth=3)
    nodes = graph.node_table()
    nodes["label"] = ["<b>x</b>", "$y$ " + "long" * 30, "a", "b", "c"]
    figure = views.sankey(nodes, graph.edge_table())
    labels = figure.data[0].node.label
    assert figure.layout.annotations[0].text == "<b>&lt;b&gt;x&lt;/b&gt;</b>"
    assert len(labels[1]) < 40 and "…" in labels[1] and "$" not in labels[1]
    assert "long" * 30 in figure.data[0].node.customdata[1]
    assert "<" not in figure.layout.title.text
    assert drawn(graph, title="").layout.title.text is None


def test_tables_that_do_not_make_a_graph_are_refused():
    graph = value_query_graph(attributed(planted_model()), depth=3)
    nodes, edges = graph.node_table(), graph.edge_table()
    for wrong, message in (
        ((nodes.drop(columns="label"), edges), r"lacks label: give the table of Graph.node_table"),
        ((nodes, edges.drop(columns="weight")), r"lacks weight: .* Graph.edge_table\(\)"),
        ((nodes.iloc[:3], edges), "edges table names 'L0.N7@2'"),
        ((pd.concat([nodes, nodes]), edges), "more than one row for id answer"),
        ((nodes, pd.concat([edges, edges])), "more than one row for source"),
        ((nodes.assign(kind="mlp"), edges), "kind must be one of .* got mlp"),
        ((nodes, edges.iloc[:0]), "edges table has no rows"),
    ):
        with pytest.raises(InputError, match=message):
            views.sankey(*wrong)
    back = edges.iloc[[0]].assign(source="answer", target="token@2")
    with pytest.raises(InputError, match="runs in a circle"):
        views.sankey(nodes, pd.concat([edges, back]))


# --- the command ------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.app, ["graph", *arguments], env={"COLUMNS": "100"})


def test_the_command_prints_a_tree_that_says_what_the_json_says():
    shown = run(PROMPT, "--depth", "2", "--values", "4", "--inputs", "3")
    assert shown.exit_code == 0, shown.output
    assert max(len(line) for line in shown.output.splitlines()) <= 100
    found = json.loads(
        run(PROMPT, "--depth", "2", "--values", "4", "--inputs", "3", "--json").stdout
    )
    labels = {node["id"]: node["label"] for node in found["nodes"]}
    for edge in found["edges"]:
        assert f"{edge['weight']:+.3f}  {labels[edge['source']]}" in shown.output
    for words in ("·Paris", "from 4 value neurons, 22% of", "rest: attention", "raises"):
        assert words in shown.output
    assert shown.output.count("rest") >= 5
    assert shown.output.count("see its other place") >= 2
    assert [node["id"] for node in found["nodes"]][0] == "answer"
    assert found["graph"]["depth"] == 2 and found["graph"]["max_values"] == 4


def test_the_command_writes_tables_json_and_a_page_that_needs_no_network(tmp_path):
    shown = run(PROMPT, "--out", str(tmp_path / "france"), "--of", "ffn", "--kind", "attn")
    assert shown.exit_code == 0, shown.output
    out = tmp_path / "france"
    assert sorted(path.name for path in out.iterdir()) == [
        "edges.parquet",
        "graph.html",
        "graph.json",
        "nodes.parquet",
        "report.html",
    ]
    page = (out / "graph.html").read_text(encoding="utf-8")
    assert "sankey" in page and 'src="http' not in page
    (title,) = re.findall("<h1>(.*?)</h1>", page)
    assert re.fullmatch(r"From the prompt to ·\w+: who set off whom", title)
    saved = json.loads((out / "graph.json").read_text(encoding="utf-8"))
    read = networkx.node_link_graph(saved, edges="edges")
    kinds = {kind for _, kind in read.nodes(data="kind")}
    assert kinds == {"answer", "token", "ffn", "attn"}
    assert all(read.nodes[node]["kind"] == "ffn" for node in read.predecessors("answer"))


def test_the_command_takes_chosen_neurons_and_opposing_inputs():
    best = json.loads(run(PROMPT, "--values", "1", "--json").stdout)["edges"][0]["source"]
    label = best.split("@")[0]
    shown = run(PROMPT, "--of", f"{label}, L3.H2.D5@4", "--opposing", "--share", "0.2")
    assert shown.exit_code == 0, shown.output
    assert "from 2 value neurons" in shown.output
    assert "-0." in shown.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--share", "0"], "--share must be above 0 and at most 1, got 0"),
        (["--depth", "0"], "--depth must be at least 1"),
        (["--values", "0"], "--values must be at least 1"),
        (["--inputs", "-1"], "--inputs must be at least 1"),
        (["--kind", "heads"], "--kind must be one of ffn, attn, both; got 'heads'"),
        (["--of", "L1"], "of must be 'attn', 'ffn', 'both' or neurons"),
        (["--convention", "x"], "--convention must be one of"),
    ],
)
def test_bad_requests_are_one_sentence_before_the_model_is_loaded(
    monkeypatch, tmp_path, arguments, words
):
    monkeypatch.setattr(
        loading, "load_model", lambda name, **asked: pytest.fail("the model was loaded")
    )
    shown = run(PROMPT, *arguments, "--out", str(tmp_path / "out"))
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert len(shown.stderr.strip().splitlines()) == 1
    assert words in shown.stderr
    assert not (tmp_path / "out").exists()


def test_a_limit_beyond_all_candidates_takes_no_more_memory(tiny_model):
    result = attribute(tiny_model, TOKENS, target=TARGET, top=3)
    every = value_query_graph(result, max_inputs=10**9, share=1.0)
    assert all(
        node.reached == pytest.approx(1.0) for node in every.nodes if node.reached is not None
    )


def test_a_chosen_share_is_reached_and_the_default_stays_readable():
    result = attribute(bundled_model(), PROMPT, top=300)
    plain = value_query_graph(result)
    assert len(plain.inputs("answer")) == 10 and plain.answer.reached < 0.5
    assert all(len(plain.inputs(node.id)) <= 4 for node in plain.nodes[1:])
    sizes = []
    for share in (0.2, 0.5, 0.9):
        graph = value_query_graph(result, share=share)
        reached = [node.reached for node in graph.nodes if node.reached is not None]
        assert min(reached) >= share - 1e-6
        sizes.append(len(graph.edges))
    assert sizes == sorted(set(sizes))
    assert len(value_query_graph(result, share=0.9, max_values=3).inputs("answer")) == 3
