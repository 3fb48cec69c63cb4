"""Query scores: by their definition, as sums, as published, and in a circuit we planted."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import (
    FAMILIES,
    SHARED,
    TOKENS,
    WRITTEN_THROUGH,
    bridge_of,
    count_forward_passes,
    hooked_of,
    hugging_face_model,
    leaving_the_random_state,
    needs_hooked_transformer,
    own_bridge_of,
)
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_neuron_attr import (
    AttnNeuron,
    FFNNeuron,
    IdentityError,
    InputError,
    attribute,
    attribute_all,
    capture,
    capture_sources,
    open_host,
    query_scores,
    tokenize,
    top_query_neurons,
    value_neurons,
)
from tl_neuron_attr.identities import subkey_identities
from tl_neuron_attr.inputs import query_inputs
from tl_neuron_attr.prompts import Prompt

GOLDEN = sorted((SHARED / "golden").glob("*-*.json"))
TARGET = 7
# Families that TransformerLens 3.9 loads as a HookedTransformer.
HOOKED = (
    ["gpt2", "llama", "mistral", "qwen2", "qwen3", "phi3", "opt"]
    + ["neox", "neox-parallel", "gptj", "bloom"]
)  # fmt: skip


def attributed(model, *, top=60, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # folded value biases
        return attribute(model, TOKENS, target=TARGET, top=top, **options)


# --- as published -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bridges():
    loaded = {}

    def load(name):
        if name not in loaded:
            path = SHARED / "models" / name
            with torch.random.fork_rng():
                loaded[name] = TransformerBridge.boot_transformers(str(path), device="cpu").eval()
        return loaded[name]

    return load


@pytest.mark.skipif(not GOLDEN, reason=f"no published outputs: {SHARED / 'golden'} is absent")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_query_lists_are_the_published_ones(path, bridges):
    golden = json.loads(path.read_text())
    result = attribute(
        bridges(golden["model"]),
        golden["token_ids"],
        target=golden["target_id"],
        convention="published",
        top=100,
    )
    for kind in ("ffn", "attn"):
        wanted = golden[f"query_layers_for_{kind}"]  # 100 in the GPT-2 notebook, 30 in Llama's
        found = result.query_layers(kind, top_values=wanted["top_value_neurons"])
        *scores, bias = found["score"]
        tolerance = 1e-4 * max(map(abs, wanted["scores"]))
        assert scores == pytest.approx(wanted["scores"], abs=tolerance)
        assert bias == 0
    wanted = golden["query_ffn_neurons_top"]
    found = result.query_neurons(len(wanted), "ffn", "attn", top_values=30)
    tolerance = 1e-4 * abs(wanted[0][-1])
    for row, (layer, index, score) in zip(found.itertuples(), wanted, strict=True):
        assert row.score == pytest.approx(score, abs=tolerance)
        if (row.layer, row.index) != (layer, index):
            (same,) = found[(found["layer"] == layer) & (found["index"] == index)]["score"]
            assert same == pytest.approx(row.score, abs=tolerance)


# --- sums -------------------------------------------------------------------------------------


def check_sums(model, tolerance=1e-5):
    """All sources add up to what the model's own hooks saw, and to the value neurons' scores."""
    result = attributed(model)
    host, captured = result.host, result.captured
    scores = result.query_scores("both", top_values=60)
    rows = scores.inputs
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    neurons = [neuron for ranked in scores.values for neuron in ranked.neurons()]
    assert {type(neurons[place]) for place in rows.value.tolist()} == {FFNNeuron, AttnNeuron}
    hooks = {"pre": "hook_pre", "gate": "hook_pre", "up": "hook_pre_linear"}
    worst = 0.0
    for row, name in enumerate(rows.input):
        neuron = neurons[rows.value[row]]
        if isinstance(neuron, FFNNeuron):
            hooked = cache[f"blocks.{neuron.layer}.mlp.{hooks[name]}"][0, -1, neuron.index]
        else:
            v = cache[f"blocks.{neuron.layer}.attn.hook_v"][0, neuron.source_pos]
            hooked = v[neuron.head // (host.n_heads // v.shape[0]), neuron.index]
        found = rows.parts[row].sum() + rows.bias[row]
        worst = max(worst, float((found - hooked).abs() / rows.absolute[row]))
        assert float((rows.total[row] - hooked).abs() / rows.absolute[row]) < tolerance
    assert worst < tolerance
    kept = torch.cat([ranked.score for ranked in scores.values])[~scores.left_out].sum()
    handed_down = scores.embed + scores.attn.sum() + scores.ffn.sum() + scores.bias
    size = (rows.weight.abs() * rows.absolute).sum()
    assert float((handed_down - kept).abs() / size) < tolerance
    # heads and neurons are what a layer wrote, less its output bias
    for layer in range(host.n_layers):
        for kind, each in (("attn", scores.heads), ("ffn", scores.ffn_neurons)):
            bias = host.b_O(layer) if kind == "attn" else host.b_out(layer)
            at = torch.zeros(()) if bias is None else bias_share(host, scores, kind, layer, bias)
            wanted = getattr(scores, kind)[layer] - at
            assert float((each[layer].sum() - wanted).abs() / size) < tolerance
    assert captured.prompt.tokens == TOKENS
    return worst


def bias_share(host, scores, kind, layer, bias):
    """What an output bias brings: as if it were all that its layer wrote."""
    name = "attn_out" if kind == "attn" else "mlp_out"
    alone = {"attn_out": 0 * scores.sources.attn_out, "mlp_out": 0 * scores.sources.mlp_out}
    alone[name][layer] = bias
    rows, share = scores.inputs, 0.0
    for row in range(len(rows.value)):
        sees_attn = kind == "attn" and rows.input[row] != "v" and not host.parallel
        own = rows.layer[row] + sees_attn
        if layer < own:
            share += rows.weight[row] * (bias @ key_of(host, scores, row))
    return share


def key_of(host, scores, row):
    """What a pre-activation rises by per unit of the residual stream, its norm frozen."""
    rows = scores.inputs
    neuron = [neuron for ranked in scores.values for neuron in ranked.neurons()][rows.value[row]]
    place = scores.sources.positions.tolist().index(int(rows.position[row]))
    x = scores.sources.resid_pre[neuron.layer, place]
    if isinstance(neuron, AttnNeuron):
        norm, W_V = host.attn_norm(neuron.layer), host.W_V(neuron.layer)
        subkey = W_V[neuron.head // (host.n_heads // len(W_V)), :, neuron.index]
    else:
        x = x if host.parallel else x + scores.sources.attn_out[neuron.layer, place]
        norm = host.ffn_norm(neuron.layer)
        weights = host.W_gate if rows.input[row] == "gate" else host.W_in
        subkey = weights(neuron.layer)[:, neuron.index]
    key = subkey * (1 if norm.gain is None else norm.gain)
    if host.norm == "layer_norm":
        return (key - key.mean()) / (x.var(correction=0) + host.eps).sqrt()
    return key / (x.square().mean() + host.eps).sqrt()


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_sources_sum_to_the_true_pre_activation_on_every_family(family, processed):
    check_sums(bridge_of(family, processed=processed))


@needs_hooked_transformer
@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("family", HOOKED)
def test_sources_sum_to_the_true_pre_activation_on_hooked_transformers(family, processed):
    check_sums(hooked_of(family, processed=processed))


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_both_classes_give_the_same_query_scores(family):
    ours, theirs = attributed(bridge_of(family)), attributed(hooked_of(family))
    ids = ["kind", "layer", "index", "head", "source_pos"]
    for of in ("ffn", "attn"):
        found, wanted = ours.query_layers(of), theirs.query_layers(of)
        assert found["score"].tolist() == pytest.approx(wanted["score"].tolist(), abs=1e-4)
        for kind in ("ffn", "attn"):
            found = ours.query_neurons(10_000, kind, of)
            wanted = theirs.query_neurons(10_000, kind, of)
            merged = found.merge(wanted, on=ids, suffixes=("", "_wanted"))
            assert len(merged) == len(found) == len(wanted)
            assert (merged["score"] - merged["score_wanted"]).abs().max() < 1e-4


def test_subkeys_and_norms_are_read_right_on_every_supported_family(any_model):
    host = open_host(any_model)
    captured = capture(host, tokenize(host, Prompt(tokens=TOKENS)))
    for identity in subkey_identities(host, captured):
        assert identity.error < 5e-6, identity


@pytest.mark.parametrize("family", ["gpt2", "llama", "bigcode", "neox", "gemma"])
def test_the_weights_are_views_not_copies(family):
    host = open_host(bridge_of(family))
    stored = {weight.untyped_storage().data_ptr() for weight in host.model.parameters()}
    for weight in (host.W_in(1), host.W_gate(1), host.W_V(1), host.W_in(2)):
        assert weight is None or weight.untyped_storage().data_ptr() in stored


# --- the definition ---------------------------------------------------------------------------


def weights_of(family, hf, layer):
    """(norm, subkeys, biases) of attention and of the FFN, from Hugging Face's own modules.

    Rows of a subkey matrix are neurons (for attention [key-value head, d_head]).
    """
    if family == "gpt2":
        block = hf.transformer.h[layer]
        d = block.ln_1.weight.shape[0]
        W_V = block.attn.c_attn.weight[:, 2 * d :].T.reshape(3, 8, d)
        ffn = [(block.mlp.c_fc.weight.T, block.mlp.c_fc.bias)]
        return block.ln_1, W_V, block.attn.c_attn.bias[2 * d :].reshape(3, 8), block.ln_2, ffn
    if family in ("llama", "qwen2"):
        block = hf.model.layers[layer]
        W_V = block.self_attn.v_proj.weight
        bias = block.self_attn.v_proj.bias
        b_V = torch.zeros(2, 6) if bias is None else bias.reshape(2, 6)
        none = torch.zeros(40)
        ffn = [(block.mlp.gate_proj.weight, none), (block.mlp.up_proj.weight, none)]
        before, between = block.input_layernorm, block.post_attention_layernorm
        return before, W_V.reshape(2, 6, -1), b_V, between, ffn
    if family in ("neox", "neox-parallel"):
        block = hf.gpt_neox.layers[layer]
        qkv = block.attention.query_key_value
        W_V = qkv.weight.reshape(4, 3, 6, -1)[:, 2]
        b_V = qkv.bias.reshape(4, 3, 6)[:, 2]
        ffn = [(block.mlp.dense_h_to_4h.weight, block.mlp.dense_h_to_4h.bias)]
        return block.input_layernorm, W_V, b_V, block.post_attention_layernorm, ffn
    block = hf.transformer.h[layer]  # GPT-J
    W_V = block.attn.v_proj.weight.reshape(3, 8, -1)
    ffn = [(block.mlp.fc_in.weight, block.mlp.fc_in.bias)]
    return block.ln_1, W_V, torch.zeros(3, 8), block.ln_1, ffn


class Definition:
    """Query scores as written down: one value neuron, one source, one dot product at a time."""

    def __init__(self, family, model, hf, convention):
        self.family, self.hf, self.convention = family, hf, convention
        self.parallel = family in ("neox-parallel", "gptj")
        self.layer_norm = family not in ("llama", "qwen2")
        with torch.no_grad():
            _, self.cache = model.run_with_cache(torch.tensor([TOKENS]))
        self.embed, self.bias = 0.0, 0.0
        self.layers, self.heads, self.ffn, self.attn = {}, {}, {}, {}
        self.ill = []

    def at(self, name, layer, position):
        return self.cache[f"blocks.{layer}.{name}"][0, position].double()

    @torch.no_grad()
    def add(self, neuron, importance, W_out, W_O):
        """Hand ``importance`` of one value neuron down to everything before it."""
        norm_1, W_V, b_V, norm_2, ffn = weights_of(self.family, self.hf, neuron.layer)
        position = getattr(neuron, "source_pos", None)
        position = len(TOKENS) - 1 if position is None else position
        x = self.at("hook_resid_pre", neuron.layer, position)
        sees_attn = isinstance(neuron, FFNNeuron) and not self.parallel
        if isinstance(neuron, AttnNeuron):
            group = neuron.head * len(W_V) // self.n_heads(neuron.layer)
            inputs = [(W_V[group, neuron.index], b_V[group, neuron.index], norm_1)]
        else:
            inputs = [(W[neuron.index], b[neuron.index], norm_2) for W, b in ffn]
            if self.convention == "published" and len(ffn) == 2:
                inputs = [(W_out[neuron.layer][neuron.index], torch.zeros(()), norm_2)]
            if sees_attn:
                x = x + self.at("hook_attn_out", neuron.layer, position)
        plans = []
        for subkey, bias, norm in inputs:
            subkey, gain = subkey.detach().double(), norm.weight.detach().double()
            centred = x - x.mean() if self.layer_norm else x
            eps = norm.eps if self.layer_norm else norm.variance_epsilon
            scale = float((centred.square().mean() + eps).sqrt())

            def reads(q, subkey=subkey, gain=gain, scale=scale):
                q = q.double()
                if self.convention == "published":
                    return float(q @ (gain * subkey))
                if self.layer_norm:
                    q = q - q.mean()
                return float((q / scale * gain) @ subkey)

            constant = 0.0
            if self.convention == "exact":
                beta = norm.bias.detach().double() if self.layer_norm else torch.zeros_like(gain)
                constant = float(beta @ subkey) + float(bias)
            plans.append((reads, constant, reads(x) + constant))
        if self.convention == "exact":
            for reads, constant, total in plans:
                absolute = abs(constant) + abs(reads(self.at("hook_resid_pre", 0, position)))
                for layer in range(neuron.layer + sees_attn):
                    absolute += abs(reads(self.at("hook_attn_out", layer, position)))
                for layer in range(neuron.layer):
                    absolute += abs(reads(self.at("hook_mlp_out", layer, position)))
                if abs(total) < 0.05 * absolute:
                    self.ill.append(neuron)
                    return
        for reads, constant, total in plans:
            worth = importance / len(plans) / total

            def to(table, key, vector, worth=worth, reads=reads):
                table[key] = table.get(key, 0.0) + worth * reads(vector)

            self.embed += worth * reads(self.at("hook_resid_pre", 0, position))
            self.bias += worth * constant
            for layer in range(neuron.layer + sees_attn):
                to(self.layers, (layer, "attn"), self.at("hook_attn_out", layer, position))
                pattern = self.cache[f"blocks.{layer}.attn.hook_pattern"][0, :, position].double()
                v = self.cache[f"blocks.{layer}.attn.hook_v"][0].double()
                for head in range(len(pattern)):
                    group = head * v.shape[1] // len(pattern)
                    for source in range(position + 1):
                        for index in range(v.shape[2]):
                            m = pattern[head, source] * v[source, group, index]
                            vector = m * W_O[layer][head, index].double()
                            to(self.heads, (layer, head), vector)
                            to(self.attn, (layer, head, index, source, position), vector)
            for layer in range(neuron.layer):
                to(self.layers, (layer, "ffn"), self.at("hook_mlp_out", layer, position))
                post = self.at("mlp.hook_post", layer, position)
                for index in range(len(post)):
                    vector = post[index] * W_out[layer][index].double()
                    to(self.ffn, (layer, index, position), vector)

    def n_heads(self, layer):
        return self.cache[f"blocks.{layer}.attn.hook_pattern"].shape[1]


def summed(table):
    """Over the position where a neuron fires, the last part of its key."""
    found = {}
    for key, score in table.items():
        found[key[:-1]] = found.get(key[:-1], 0.0) + score
    return found


@pytest.mark.parametrize("convention", ["exact", "published"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "neox", "neox-parallel", "gptj"])
def test_query_scores_are_their_definition(family, convention):
    model = bridge_of(family, dtype=torch.float64)
    class_name, config = FAMILIES[family]
    with torch.random.fork_rng():
        hf = hugging_face_model(class_name, config()).double()
    result = attributed(model, convention=convention)
    host = result.host
    chosen = [*result.ffn_neurons.neurons()[:5], *result.attn_neurons.neurons()[:6]]
    # of each layer, and none of the best
    chosen += [FFNNeuron(layer, 3) for layer in range(3)]
    chosen += [AttnNeuron(layer, 1, 2, layer + 2) for layer in range(3)]
    scores = result.query_scores(chosen)
    oracle = Definition(family, model, hf, convention)
    W_out = [host.W_out(layer) for layer in range(3)]
    W_O = [host.W_O(layer) for layer in range(3)]
    for ranked in scores.values:
        for neuron, importance in zip(ranked.neurons(), ranked.score.tolist(), strict=True):
            oracle.add(neuron, importance, W_out, W_O)
    near = dict(abs=1e-9, rel=1e-6)  # Hugging Face's RMSNorm computes in float32 even here
    neurons = [neuron for ranked in scores.values for neuron in ranked.neurons()]
    assert [n for n, out in zip(neurons, scores.left_out, strict=True) if out] == oracle.ill
    if family in ("llama", "qwen2"):
        near = dict(abs=1e-5, rel=1e-5)
    assert float(scores.embed) == pytest.approx(oracle.embed, **near)
    assert float(scores.bias) == pytest.approx(oracle.bias, **near)
    for (layer, kind), score in oracle.layers.items():
        assert float(getattr(scores, kind)[layer]) == pytest.approx(score, **near)
    for (layer, head), score in oracle.heads.items():
        assert float(scores.heads[layer, head]) == pytest.approx(score, **near)
    for (layer, index), score in summed(oracle.ffn).items():
        assert float(scores.ffn_neurons[layer, index]) == pytest.approx(score, **near)
    for kind, wanted in (("ffn", oracle.ffn), ("attn", oracle.attn)):
        for by_position in (False, True):
            found = top_query_neurons(
                host, result.captured, scores, 100_000, kind, by_position=by_position
            )
            keys = [
                (n.layer, n.index) if kind == "ffn" else (n.layer, n.head, n.index, n.source_pos)
                for n in found.neurons.neurons()
            ]
            fires = found.position.tolist()
            if by_position:
                keys = [(*key, place) for key, place in zip(keys, fires, strict=True)]
            assert len(set(keys)) == len(keys)
            table = wanted if by_position else summed(wanted)
            got = dict(zip(keys, found.neurons.score.tolist(), strict=True))
            assert table.keys() <= got.keys()
            for key, score in got.items():
                assert score == pytest.approx(table.get(key, 0.0), **near)
            if not by_position:  # where each does most
                for key, place in zip(keys, fires, strict=True):
                    each = {at: abs(wanted.get((*key, at), 0.0)) for at in range(len(TOKENS))}
                    assert each[place] == pytest.approx(max(each.values()), **near)
            ordered = found.neurons.score
            assert (ordered[1:] <= ordered[:-1]).all()
            for number in range(0, len(keys), 17):  # coefficients are those where it fires
                layer, *place = keys[number]
                if kind == "ffn":
                    m = oracle.at("mlp.hook_post", layer, fires[number])[place[0]]
                else:
                    head, index, source = place[:3]
                    pattern = oracle.cache[f"blocks.{layer}.attn.hook_pattern"][0]
                    v = oracle.cache[f"blocks.{layer}.attn.hook_v"][0, source]
                    m = pattern[head, fires[number], source]
                    m = m * v[head * len(v) // len(pattern), index]
                assert float(found.neurons.coefficient[number]) == pytest.approx(float(m), **near)


def test_gate_and_up_are_averaged_and_each_can_be_had():
    result = attributed(bridge_of("llama"))
    host, captured = result.host, result.captured
    values = [result.ffn_neurons.first(20)]
    both = query_scores(host, captured, values)
    gate, up = (query_scores(host, captured, values, through=name) for name in ("gate", "up"))
    assert set(both.inputs.input) == {"gate", "up"}
    assert (set(gate.inputs.input), set(up.inputs.input)) == ({"gate"}, {"up"})
    shares = (both.inputs.shares.sum(1) + both.inputs.bias / both.inputs.total).tolist()
    assert shares == pytest.approx([1.0] * 40, abs=1e-3)
    if not both.left_out.any():
        for name in ("embed", "attn", "ffn", "heads", "ffn_neurons", "bias"):
            mean = (getattr(gate, name) + getattr(up, name)) / 2
            assert torch.allclose(getattr(both, name), mean, atol=1e-4)
    # of one value neuron with sound pre-activations it holds whatever the rest
    place = int((~both.left_out).nonzero()[0])
    one = [replace_rows(values[0], place)]
    both, gate, up = (
        query_scores(host, captured, one, through=name) for name in (None, "gate", "up")
    )
    assert torch.allclose(both.ffn_neurons, (gate.ffn_neurons + up.ffn_neurons) / 2, atol=1e-5)
    assert float(gate.embed) != pytest.approx(float(up.embed), abs=1e-6)
    with pytest.raises(InputError, match="no FFN neuron has two inputs"):
        gpt2 = attributed(bridge_of("gpt2"))
        query_scores(gpt2.host, gpt2.captured, [gpt2.ffn_neurons], through="up")


@pytest.mark.parametrize("family", WRITTEN_THROUGH)
def test_layers_are_read_where_they_are_fed_from_and_nowhere_else(family):
    """Of two positions a layer is read at one, another at the other; norms have their scales."""
    model = bridge_of(family, dtype=torch.float64)
    result = attribute(model, TOKENS, target=TARGET, top=10_000)
    ffn, attn = result.ffn_neurons, result.attn_neurons
    at_source = (attn.layer == 2) & (attn.source_pos == 1)
    values = [
        ffn.at((ffn.layer == 1).nonzero()[:3, 0]),
        attn.at(at_source.nonzero()[:3, 0]),
    ]
    sources = capture_sources(result.host, result.captured, [1])
    scores = query_scores(result.host, result.captured, values, sources)
    assert (scores.ffn_depth, scores.attn_depth) == (2, 2) and not scores.left_out.all()
    # there are no output biases
    torch.testing.assert_close(scores.ffn_neurons.sum(-1), scores.ffn, rtol=0, atol=1e-7)
    torch.testing.assert_close(scores.heads.sum(-1), scores.attn, rtol=0, atol=1e-7)
    assert scores.ffn[1].abs() > 1e-3 and (scores.ffn_by_position[1, 1] == 0).all()


def test_a_key_with_entries_of_zero_is_read_like_any_other():
    model = own_bridge_of("llama", dtype=torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.W_gate[0] = block.mlp.W_in[0] = 0.0
            block.attn.W_V[:, 0] = 0.0
    result = attributed(model, top=30)
    scores = result.query_scores("both", top_values=30)
    torch.testing.assert_close(scores.heads.sum(-1), scores.attn, rtol=0, atol=1e-9)
    torch.testing.assert_close(scores.ffn_neurons.sum(-1), scores.ffn, rtol=0, atol=1e-9)
    assert scores.attn[0].abs() > 1e-3 and scores.ffn[0].abs() > 1e-3


def test_inputs_do_not_depend_on_how_many_value_neurons_are_looked_at_at_a_time():
    result = attributed(bridge_of("llama"), top=8)
    values = [result.ffn_neurons]
    whole, one = (
        query_inputs(result.host, result.captured, values, budget=budget) for budget in (2**30, 1)
    )
    for kind in ("ffn", "attn"):
        torch.testing.assert_close(
            whole.inputs[kind].neurons.neurons.score, one.inputs[kind].neurons.neurons.score
        )
        assert torch.equal(whole.inputs[kind].value, one.inputs[kind].value)
    assert len(whole.inputs["ffn"].value) > 0
    # the defaults
    for some, default in (({"most": 2000}, {"share": 0.5}), ({"share": 1.0}, {"most": 5})):
        left, said = (
            query_inputs(result.host, result.captured, values, **asked)
            for asked in (some, some | default)
        )
        assert torch.equal(left.inputs["ffn"].value, said.inputs["ffn"].value)
    torch.testing.assert_close(whole.reached, one.reached)


def replace_rows(ranked, place):
    columns = {
        name: getattr(ranked, name)[place : place + 1]
        for name in ("layer", "number", "index", "coefficient", "score")
    }
    return replace(ranked, **columns)


# --- a planted circuit ------------------------------------------------------------------------


@leaving_the_random_state
def planted_model():
    """L0.N7 writes, where token 5 is, what L1.H1.D2 reads; that writes what L2.N11 reads."""
    class_name, config = FAMILIES["gpt2"]
    hf = hugging_face_model(class_name, config(), scale=0.02)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)))[0]
    basis = basis - basis.mean(1, keepdim=True)  # a LayerNorm sees no mean
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
        second.attn.c_proj.weight[8 + 2] = 3 * message
        third.mlp.c_fc.weight[:, 11] = 2 * message
        third.mlp.c_proj.weight[11] = 2 * answer
    return build_bridge_from_module(
        hf, class_name, hf_config=hf.config, dtype=torch.float32, device="cpu"
    ).eval()


@pytest.mark.parametrize("convention", ["exact", "published"])
def test_a_planted_circuit_is_traced_back_step_by_step(convention):
    model = planted_model()
    result = attribute(model, TOKENS, target=TARGET, top=50, convention=convention)
    assert str(result.ffn_neurons.neurons()[0]) == "L2.N11"

    layers = result.query_layers("L2.N11").sort_values("score", ascending=False)
    assert (layers.iloc[0]["kind"], layers.iloc[0]["layer"]) == ("attn", 1)
    heads = result.query_heads(FFNNeuron(2, 11), top=1)
    assert (heads.loc[0, "layer"], heads.loc[0, "head"]) == (1, 1)
    carrier = result.query_neurons(1, "attn", "L2.N11").loc[0]
    place = [int(carrier[name]) for name in ("layer", "head", "index", "source_pos")]
    assert place == [1, 1, 2, 2]  # token 5 is at position 2

    label = str(AttnNeuron(*place))
    layers = result.query_layers(label).sort_values("score", ascending=False)
    assert (layers.iloc[0]["kind"], layers.iloc[0]["layer"]) == ("ffn", 0)
    origin = result.query_neurons(3, "ffn", label, by_position=True)
    assert origin.loc[0, ["layer", "index", "position"]].tolist() == [0, 7, 2]
    assert origin.loc[0, "score"] > 10 * abs(origin.loc[1, "score"])
    # a different position of the same neuron is set off by something else
    other = result.query_layers("L1.H1.D2@4")
    assert other["score"].abs().max() < 0.5 * layers.iloc[0]["score"]


# --- the tables -------------------------------------------------------------------------------


def test_tables_have_the_columns_of_the_others(tiny_model):
    result = attributed(tiny_model)
    layers = result.query_layers()
    assert layers.columns.tolist() == ["layer", "kind", "score"]
    assert layers["kind"].tolist() == ["embed", *["attn", "ffn"] * 3, "bias"]
    assert layers["layer"].isna().tolist() == [True, *[False] * 6, True]
    assert result.query_heads().columns.tolist() == ["layer", "head", "score"]
    assert len(result.query_heads(top=2)) == 2
    for kind in ("ffn", "attn"):
        table = result.query_neurons(5, kind, tokens=3)
        wanted = result.neurons(kind, 5, tokens=3)
        assert table.columns.tolist() == [*table.columns[:10], "position", *wanted.columns[10:]]
        assert (table[wanted.columns].dtypes == wanted.dtypes).all()
        assert (table["role"] == "query").all()
        assert table["rank"].tolist() == [1, 2, 3, 4, 5]
        assert table["score"].is_monotonic_decreasing
        by_position = result.query_neurons(5, kind, by_position=True)
        assert by_position.columns.tolist() == [*table.columns[:10], "position"]
    values = result.query_values("both", top_values=4)
    gated = result.host.W_gate(0) is not None
    assert values["input"].tolist() == (["gate", "up"] if gated else ["pre"]) * 4 + ["v"] * 4
    assert values.loc[values["kind"] == "ffn", "head"].isna().all()


def test_both_kinds_together_are_the_sum_of_each(tiny_model):
    result = attributed(tiny_model)
    ffn, attn, both = (result.query_scores(of) for of in ("ffn", "attn", "both"))
    for name in ("embed", "bias", "attn", "ffn", "heads", "ffn_neurons"):
        total = getattr(ffn, name) + getattr(attn, name)
        assert torch.allclose(getattr(both, name), total, atol=1e-5)


def test_one_neuron_after_the_other_gives_the_sum_of_all(tiny_model):
    result = attributed(tiny_model)
    neurons = result.attn_neurons.neurons()[:6]
    together = result.query_neurons(10_000, "ffn", "attn", top_values=6)
    as_list = result.query_neurons(10_000, "ffn", neurons)
    assert as_list["score"].tolist() == pytest.approx(together["score"].tolist(), abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        alone = sum(result.query_scores(str(neuron)).ffn_neurons for neuron in neurons)
    assert torch.allclose(alone, result.query_scores(neurons).ffn_neurons, atol=1e-5)
    # naming a neuron twice changes nothing
    twice = result.query_scores([*neurons, neurons[0], str(neurons[1])])
    assert torch.allclose(twice.ffn_neurons, result.query_scores(neurons).ffn_neurons)


def test_a_chosen_neuron_has_the_score_it_is_ranked_with(tiny_model):
    result = attributed(tiny_model)
    for ranked in (result.ffn_neurons, result.attn_neurons):
        (found,) = value_neurons(
            result.host, result.captured, result.out, result.target, ranked.neurons()
        )
        assert torch.allclose(found.score, ranked.score, atol=1e-6)
        assert torch.allclose(found.coefficient, ranked.coefficient)
        assert torch.equal(found.number, ranked.number)


def test_nothing_but_the_embedding_sets_off_attention_of_layer_0(tiny_model):
    result = attributed(tiny_model)
    neuron = AttnNeuron(0, 1, 2, 3)
    for kind in ("ffn", "attn"):
        table = result.query_neurons(5, kind, neuron, tokens=2)
        assert len(table) == 0
        assert table.columns.tolist()[:2] == ["prompt_id", "role"]
    layers = result.query_layers(neuron).set_index("kind")["score"]
    (ranked,) = result.query_scores(neuron).values
    assert layers["embed"] + layers["bias"] == pytest.approx(float(ranked.score), abs=1e-6)
    assert (layers[["attn", "ffn"]] == 0).all()


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_an_ffn_neuron_of_layer_0_is_fed_by_attention_only_in_sequential_blocks(family):
    result = attributed(bridge_of(family))
    assert len(result.query_neurons(5, "ffn", "L0.N3")) == 0
    attention = result.query_neurons(5, "attn", "L0.N3")
    assert len(attention) == (0 if result.host.parallel else 5)
    layers = result.query_layers("L0.N3").set_index("kind")["score"]
    assert layers["embed"] != 0
    assert (layers["attn"] != 0).any() == (not result.host.parallel)


@pytest.mark.parametrize("options", [{"against": 3}, {"convention": "recomputed"}])
def test_contrasts_and_other_read_outs_hand_their_own_scores_down(tiny_gpt2, options):
    result = attributed(tiny_gpt2, **options)
    scores = result.query_scores("both")
    assert scores.convention == "exact"
    kept = torch.cat([ranked.score for ranked in scores.values])[~scores.left_out].sum()
    handed_down = scores.embed + scores.attn.sum() + scores.ffn.sum() + scores.bias
    assert float(handed_down) == pytest.approx(float(kept), abs=1e-4)


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"position": 3}])
def test_other_dtypes_and_positions(tiny_model, options):
    result = attributed(tiny_model, **options)
    scores = result.query_scores("both")
    assert scores.ffn_neurons.dtype == options.get("dtype", torch.float32)
    assert int(scores.sources.positions.max()) == result.captured.prompt.read_pos
    wanted = attributed(tiny_model) if "dtype" in options else result
    assert torch.allclose(
        scores.ffn_neurons.float(), wanted.query_scores("both").ffn_neurons, atol=1e-4
    )


def test_a_prompt_of_a_batch_has_the_query_scores_it_has_alone(tiny_model):
    prompts = [TOKENS[:3], TOKENS]
    for result in attribute_all(tiny_model, prompts, target=TARGET, top=60):
        alone = attribute(tiny_model, result.captured.prompt.tokens, target=TARGET, top=60)
        for of in ("ffn", "attn"):
            found, wanted = result.query_layers(of), alone.query_layers(of)
            assert found["score"].tolist() == pytest.approx(wanted["score"].tolist(), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_narrow_weights_are_scored_in_float32(family):
    result = attributed(bridge_of(family, dtype=torch.bfloat16))
    scores = result.query_scores("both")
    assert scores.ffn_neurons.dtype == torch.float32
    assert scores.ffn_neurons.isfinite().all()


# --- ill-conditioned value neurons ------------------------------------------------------------


@pytest.fixture(scope="module")
def with_ill_conditioned():
    """Every neuron of a model, of which some are ill-conditioned."""
    result = attributed(bridge_of("gpt2"), top=10_000)
    everything = result.query_values("both", top_values=10_000)
    bad = everything[everything["ill_conditioned"]]
    assert 0 < len(bad) < 0.2 * len(everything)
    return result, everything, bad


def test_ill_conditioned_value_neurons_are_flagged_listed_and_left_out(with_ill_conditioned):
    result, everything, bad = with_ill_conditioned
    ratio = everything["total"].abs() / everything["absolute"]
    assert ((ratio < 0.05) == everything["ill_conditioned"]).all()
    assert (everything["left_out"] == everything["ill_conditioned"]).all()
    index = bad[bad["kind"] == "ffn"].iloc[0]
    ill, sound = (
        FFNNeuron(int(index["layer"]), int(index["index"])),
        result.ffn_neurons.neurons()[0],
    )
    found, wanted = result.query_scores([sound, ill]), result.query_scores([sound])
    assert found.left_out.tolist() == [False, True]
    assert torch.allclose(found.ffn_neurons, wanted.ffn_neurons, atol=1e-6)
    assert torch.allclose(found.embed, wanted.embed, atol=1e-6)


def test_asking_about_ill_conditioned_neurons_alone_warns(with_ill_conditioned):
    result, _, bad = with_ill_conditioned
    index = bad[bad["kind"] == "ffn"].iloc[0]
    with pytest.warns(UserWarning, match="ill-conditioned"):
        table = result.query_layers(FFNNeuron(int(index["layer"]), int(index["index"])))
    assert (table["score"] == 0).all()


def test_in_published_they_stay_and_dominate(with_ill_conditioned):
    result, _, _ = with_ill_conditioned
    published = replace(result, convention="published")
    values = published.query_values("ffn", top_values=10_000)
    assert values["ill_conditioned"].any()
    assert not values["left_out"].any()
    bad = values[values["ill_conditioned"]].iloc[0]
    scores = published.query_scores(FFNNeuron(int(bad["layer"]), int(bad["index"])))
    assert scores.inputs.shares.abs().max() > 3


@pytest.mark.parametrize("convention", ["exact", "published"])
def test_a_neuron_that_reads_nothing_has_no_shares_in_any_convention(convention):
    model = own_bridge_of("gpt2")
    with torch.no_grad():  # its pre-activation is 0, of parts that are 0
        model.blocks[1].mlp.W_in[:, 7] = 0.0
        model.blocks[1].mlp.b_in[7] = 0.0
    result = attributed(model, convention=convention)
    sound = result.ffn_neurons.neurons()[0]
    scores = result.query_scores(["L1.N7", sound])
    assert scores.left_out.tolist() == [True, False]
    assert scores.inputs.total[0] == 0
    assert torch.equal(scores.ffn_neurons, result.query_scores(sound).ffn_neurons)
    with pytest.warns(UserWarning, match="ill-conditioned"):
        assert (result.query_layers("L1.N7")["score"] == 0).all()


# --- what is run, and what is left behind -----------------------------------------------------


def test_the_prompt_is_run_again_once_and_only_for_attention(monkeypatch):
    model = own_bridge_of("gpt2")
    result = attributed(model)
    passes = count_forward_passes(model, monkeypatch)
    result.query_layers("ffn")
    assert len(passes) == 1  # the check of a model's first query
    result.query_layers("ffn")
    attributed(model).query_layers("ffn")
    assert len(passes) == 2  # the other attribution
    result.query_layers("attn")
    assert len(passes) == 3
    result.query_neurons(5)
    result.query_heads("both")
    result.query_layers(result.attn_neurons.neurons()[3])
    assert len(passes) == 3


@pytest.mark.parametrize("convention", ["exact", "recomputed"])
def test_value_neurons_beyond_those_ranked_are_ranked_when_asked_for(tiny_model, convention):
    few = attributed(tiny_model, top=4, convention=convention)
    many = attributed(tiny_model, top=60, convention=convention)
    for of in ("ffn", "attn", "both"):
        for top_values in (3, 30, 60):
            found = few.query_layers(of, top_values=top_values)["score"]
            wanted = many.query_layers(of, top_values=top_values)["score"]
            assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    assert len(few.attn_neurons) == len(few.neurons("attn")) == 4  # the result lists as before
    everything = few.query_scores("both", top_values=10**6)
    assert len(everything.left_out) == sum(
        block.n_neurons for block in (*few.ffns, *few.attns)
    )  # all there are


def test_scores_had_before_are_not_computed_again(tiny_model, monkeypatch):
    result = attributed(tiny_model)
    scores = result.query_scores("both", top_values=60)
    wanted = (
        result.query_layers("both", top_values=60),
        result.query_heads("both", top_values=60, top=3),
        result.query_neurons(7, None, "both", top_values=60, tokens=2),
        result.query_values("both", top_values=60),
    )
    passes = count_forward_passes(tiny_model, monkeypatch)
    found = (
        result.query_layers(scores),
        result.query_heads(scores, top=3),
        result.query_neurons(7, None, scores, tokens=2),
        result.query_values(scores),
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.equals(theirs)
    assert not passes
    assert found[2]["kind"].tolist() == ["ffn"] * 7 + ["attn"] * 7


def test_of_a_long_prompt_only_the_default_value_neurons_positions_are_kept(tiny_gpt2):
    result = attribute(tiny_gpt2, range(2, 32), target=TARGET, top=300)
    result.query_layers("attn", top_values=300)
    kept = set(result._sources.positions.tolist())
    assert kept == set(result.attn_neurons.first(30).source_pos.tolist())
    assert len(kept) < len(set(result.attn_neurons.source_pos.tolist()))


def test_sources_are_what_a_capture_at_their_position_holds(tiny_model):
    host = open_host(tiny_model)
    captured = capture(host, tokenize(host, Prompt(tokens=TOKENS)))
    _, cache = tiny_model.run_with_cache(torch.tensor([TOKENS]))
    for sources in (
        capture_sources(host, captured, [4, 1, 4]),
        capture_sources(host, captured, [1, 4], cache),
        capture_sources(host, captured, [1, 4], cache.remove_batch_dim()),
    ):
        assert sources.positions.tolist() == [1, 4]
        for place, position in enumerate([1, 4]):
            there = capture(host, tokenize(host, Prompt(tokens=TOKENS, position=position)))
            for name in ("resid_pre", "attn_out", "mlp_out", "mlp_post"):
                assert torch.equal(getattr(sources, name)[:, place], getattr(there, name))
            paid = sources.pattern[:, :, place]
            assert torch.equal(paid[..., : position + 1], there.pattern)
            assert not paid[..., position + 1 :].any()


def test_a_model_that_changed_since_is_noticed():
    model = own_bridge_of("gpt2")
    result = attributed(model)
    with torch.no_grad():
        model.blocks[1].mlp.W_out.mul_(1.1)
    with pytest.raises(InputError, match="no longer gives the activations captured"):
        capture_sources(result.host, result.captured, [2])
    for layer in (0, 2):
        result = attributed(model)
        result.query_layers("ffn")
        with torch.no_grad():
            next(model.blocks[layer].ln1.parameters()).mul_(1.5)
        with pytest.raises((InputError, IdentityError), match="no longer gives|fails"):
            result.query_layers("attn")


def test_hooks_that_edit_pre_activations_are_noticed(tiny_gpt2):
    result = attributed(tiny_gpt2)
    result.query_layers("ffn")

    def halve(activation, hook):
        return activation / 2

    point = tiny_gpt2.hook_dict["blocks.1.attn.hook_v"]
    point.add_hook(halve)
    try:
        edited = attributed(tiny_gpt2)
        with pytest.raises(IdentityError, match="value vectors"):
            edited.query_layers("ffn")
        with pytest.raises((InputError, IdentityError)):
            result.query_layers("attn")
    finally:
        tiny_gpt2.reset_hooks(including_permanent=True)


# --- what cannot be asked ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ("L9.N1", "there is no neuron L9.N1: the model has 3 layers of 96 FFN neurons"),
        (FFNNeuron(1, 96), "there is no neuron L1.N96"),
        (FFNNeuron(-1, 0), "there is no neuron"),
        ("L0.H3.D0@1", "there is no neuron L0.H3.D0@1: the model has 3 layers of 3 heads of 8"),
        ("L0.H0.D8@1", "there is no neuron L0.H0.D8@1"),
        ("L0.H0.D0@6", "source positions are 0 to 5"),
        ("L0.H0.D0", "L0.H0.D0 has no source position.*as in L0.H0.D0@5"),
        ("heads", "of must be 'attn', 'ffn', 'both' or neurons"),
        ([], "no value neuron"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_sentence(tiny_gpt2, monkeypatch, of, message):
    result = attributed(tiny_gpt2)
    result.query_layers("ffn")
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    with pytest.raises(InputError, match=message) as error:
        result.query_layers(of)
    assert "\n" not in str(error.value)
    assert not passes


def test_numbers_that_make_no_sense_are_refused(tiny_gpt2):
    result = attributed(tiny_gpt2, top=4)
    with pytest.raises(InputError, match="top must be at least 1"):
        result.query_neurons(0, top_values=4)
    with pytest.raises(InputError, match="top_values must be at least 1"):
        result.query_layers(top_values=0)
    host, captured = result.host, result.captured
    with pytest.raises(InputError, match="it is not known what happened at source position"):
        (value,) = value_neurons(
            host, captured, result.out, result.target, [AttnNeuron(1, 0, 0, 2)]
        )
        query_scores(host, captured, [value])
    over = attributed(tiny_gpt2).attn_neurons_over_sources
    with pytest.raises(InputError, match="by source position"):
        query_scores(host, captured, [over])
    with pytest.raises(InputError, match="source position 6 is out of range"):
        capture_sources(host, captured, [6])
    _, cache = tiny_gpt2.run_with_cache(torch.tensor([TOKENS[::-1]]))
    with pytest.raises(InputError, match="other tokens"):
        capture_sources(host, captured, [1], cache)
