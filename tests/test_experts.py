"""Mixtures of experts: neurons behind a router, against Hugging Face's own modules in float64."""

import json
import warnings
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    MIXTURES,
    TOKENS,
    bridge_from,
    bridge_of,
    hugging_face_model,
    leaving_the_random_state,
    needs_hooked_transformer,
    own_bridge_of,
)

from tl_neuron_attr import (
    METHODS,
    AttnNeuron,
    Case,
    FFNNeuron,
    InputError,
    Unit,
    UnsupportedModelError,
    attribute,
    attribute_all,
    attribute_answer,
    capture_zeroed,
    compare,
    edit_weights,
    expert_id,
    experts,
    from_pair,
    hook_id,
    intervened,
    layout_of,
    mean_coefficients,
    module_id,
    neurons_of,
    open_host,
    parse_id,
    plan,
    projection_index,
    random_neurons,
    replace_mean,
    run_prompts,
    scale,
    tokenize,
    value_query_graph,
    zero,
)
from tl_neuron_attr.capture import capture_all, capture_sources
from tl_neuron_attr.decompose import ffn_decomposition, slopes
from tl_neuron_attr.errors import IdentityError
from tl_neuron_attr.evaluate.rankings import on_first, random_beside
from tl_neuron_attr.experts import coefficients, experts_on, routed
from tl_neuron_attr.hook_points import coefficient_name
from tl_neuron_attr.host import weights_hash
from tl_neuron_attr.identities import identities, subkey_identities
from tl_neuron_attr.pieces import Pieces, times
from tl_neuron_attr.prompts import Prompt
from tl_neuron_attr.readout import baseline_of_runs
from tl_neuron_attr.scores import neuron_scores
from tl_neuron_attr.shapes import shapes_of
from tl_neuron_attr.topk import tangent_bounds

TARGET = 7
ALL = 10_000
LAYERS = range(3)


@pytest.fixture(scope="module", params=list(MIXTURES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return bridge_of(family)


@pytest.fixture(scope="module")
def editable(family):
    """The same weights, to be written to: torch counts that, also where they are given back."""
    return own_bridge_of(family)


@pytest.fixture(scope="module")
def whole(model):
    """Every neuron of the prompt, scored."""
    return attribute(model, TOKENS, target=TARGET, top=ALL)


@pytest.fixture(scope="module")
def one():
    """Of the family that has all there is: routed experts, and one that is shared."""
    return attribute(bridge_of("qwen2moe"), TOKENS, target=TARGET, top=ALL)


# --- by definition ----------------------------------------------------------------------------


class Definition:
    """What every neuron of every expert writes, neuron by neuron, from the weights in float64."""

    def __init__(self, family):
        class_name, config = MIXTURES[family]
        self.hf = hugging_face_model(class_name, config())
        self.hf.set_experts_implementation("eager")
        self.hf.double()
        self.hf.requires_grad_(False)
        self.cfg = self.hf.config
        seen = {}
        for layer, block in enumerate(self.hf.model.layers):
            block.register_forward_hook(
                lambda _, went_in, came_out, layer=layer: seen.update(
                    {("pre", layer): went_in[0], ("post", layer): came_out}
                )
            )
            block.mlp.register_forward_hook(
                lambda _, went_in, came_out, layer=layer: seen.update(
                    {("read", layer): went_in[0], ("wrote", layer): came_out}
                )
            )
        with torch.no_grad():
            self.log_probs = self.hf(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)
        # some FFNs give their router's logits besides
        outputs = {key: each if isinstance(each, tuple) else (each,) for key, each in seen.items()}
        self.seen = {key: first[0].double() for key, (first, *_) in outputs.items()}

    def routed(self, layer, position):
        """Expert -> its weight at a position, by the definition of each family."""
        router = self.hf.model.layers[layer].mlp.gate
        logits = [float(row @ self.seen["read", layer][position]) for row in router.weight.double()]
        chances = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
        best = sorted(range(len(chances)), key=lambda expert: -chances[expert])[: router.top_k]
        total = (
            sum(chances[expert] for expert in best)
            if getattr(router, "norm_topk_prob", True)
            else 1.0
        )
        return {expert: chances[expert] / total for expert in best}

    def neurons(self, layer, position=-1):
        """(coefficient, row) of every neuron of a layer, expert after expert, shared ones last."""
        block, x = self.hf.model.layers[layer].mlp, self.seen["read", layer][position]
        routed = self.routed(layer, position)
        silu = torch.nn.functional.silu
        found = []
        for expert in range(block.experts.num_experts):
            gates, ups = block.experts.gate_up_proj[expert].double().chunk(2)
            for gate, up, row in zip(gates, ups, block.experts.down_proj[expert].T, strict=True):
                found.append((routed.get(expert, 0.0) * silu(gate @ x) * (up @ x), row.double()))
        if hasattr(block, "shared_expert"):
            shared = block.shared_expert
            weight = (block.shared_expert_gate.weight.double()[0] @ x).sigmoid()
            for gate, up, row in zip(
                shared.gate_proj.weight,
                shared.up_proj.weight,
                shared.down_proj.weight.T,
                strict=True,
            ):
                value = weight * silu(gate.double() @ x) * (up.double() @ x)
                found.append((value, row.double()))
        coefficients, rows = zip(*found, strict=True)
        return torch.stack(coefficients).detach(), torch.stack(rows).detach()

    def log_prob(self, x):
        final = self.seen["post", 2][-1]
        scale = (final.square().mean() + self.cfg.rms_norm_eps).sqrt()
        normed = x / scale * self.hf.model.norm.weight.detach().double()
        logits = normed @ self.hf.lm_head.weight.detach().double().T
        return logits.log_softmax(-1)[..., TARGET]


@cache
@leaving_the_random_state
def definition_of(family):
    return Definition(family)


@pytest.fixture(scope="module")
def definition(family):
    return definition_of(family)


def test_neurons_of_experts_sum_to_what_the_ffn_writes(definition):
    """The definition itself."""
    for layer in LAYERS:
        for position in (0, -1):
            coefficients, rows = definition.neurons(layer, position)
            wrote = definition.seen["wrote", layer][position]
            torch.testing.assert_close(coefficients @ rows, wrote, rtol=0, atol=2e-7)


def test_every_coefficient_and_subvalue_is_the_definitions(definition, whole):
    every = torch.arange(whole.host.d_mlp)
    for layer in LAYERS:
        coefficients, rows = definition.neurons(layer)
        block = ffn_decomposition(whole.host, whole.captured, layer)
        torch.testing.assert_close(block.coefficients.double(), coefficients, rtol=0, atol=2e-6)
        torch.testing.assert_close(block.subvalues(every).double(), rows, rtol=0, atol=1e-7)
        assert torch.equal(block.coefficients == 0, coefficients == 0)


def test_every_score_is_the_definitions(definition, whole):
    assert whole.log_prob == pytest.approx(float(definition.log_probs[TARGET]), abs=1e-5)
    found = whole.ffn_neurons
    assert len(found) == 3 * whole.host.d_mlp
    for layer in LAYERS:
        coefficients, rows = definition.neurons(layer)
        mid = definition.seen["post", layer][-1] - definition.seen["wrote", layer][-1]
        wanted = definition.log_prob(mid + coefficients[:, None] * rows) - definition.log_prob(mid)
        here = found.layer == layer
        scores = found.score[here].double()
        torch.testing.assert_close(scores, wanted[found.index[here]], rtol=0, atol=1e-5)


def test_at_other_positions_they_are_the_definitions_too(definition, model, whole):
    sources = capture_sources(whole.host, whole.captured, range(len(TOKENS)))
    for layer, position in ((0, 0), (1, 3), (2, 4)):
        wanted, _ = definition.neurons(layer, position)
        found = sources.mlp_post[layer, position].double()
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


# --- what every family must pass --------------------------------------------------------------


def test_every_identity_holds(whole):
    for identity in identities(whole.host, whole.captured) + subkey_identities(
        whole.host, whole.captured
    ):
        assert identity.error < 5e-6, identity


def test_in_float64_the_identities_are_ten_thousand_times_closer():
    found = attribute(bridge_of("qwen2moe", dtype=torch.float64), TOKENS, target=TARGET, top=3)
    ffn = next(i for i in identities(found.host, found.captured) if "FFN" in i.name)
    assert ffn.error < 5e-10


def test_a_router_that_is_not_as_believed_is_refused(monkeypatch):
    monkeypatch.setattr(experts, "KNOWN", {"MixtralForCausalLM": False})
    with pytest.raises(IdentityError, match="the FFN neurons fails"):
        attribute(own_bridge_of("mixtral"), TOKENS, top=1)


def test_the_best_are_those_of_all_and_most_are_never_scored(model, whole):
    found = attribute(model, TOKENS, target=TARGET, top=12)
    ours, theirs = found.ffn_neurons, whole.ffn_neurons
    assert ours.neurons() == theirs.neurons()[:12]
    torch.testing.assert_close(ours.score, theirs.score[:12], rtol=0, atol=1e-6)
    assert ours.certificate.holds and ours.certificate.applies
    assert ours.certificate.evaluated < ours.certificate.total / 2


def test_a_batch_gives_what_each_prompt_gives_alone(one):
    model = one.host.model
    prompts = [list(TOKENS), [9, 30], [4] * 9]
    together = attribute_all(model, prompts, target=TARGET, top=9, batch_size=3)
    for found, tokens in zip(together, prompts, strict=True):
        alone = attribute(model, tokens, target=TARGET, top=9)
        assert found.ffn_neurons.neurons() == alone.ffn_neurons.neurons()
        torch.testing.assert_close(
            found.ffn_neurons.score, alone.ffn_neurons.score, rtol=0, atol=2e-6
        )


def test_padding_on_either_side_changes_no_capture(one):
    model = one.host.model
    host = open_host(model)
    asked = [tokenize(host, Prompt(tokens=tokens)) for tokens in (TOKENS, (9, 30), (4,) * 9)]
    alone = [capture_all(host, [prompt])[0] for prompt in asked]
    for side in ("left", "right"):
        for ours, theirs in zip(capture_all(host, asked, padding_side=side), alone, strict=True):
            torch.testing.assert_close(ours.mlp_post, theirs.mlp_post, rtol=1e-4, atol=1e-5)


def test_a_cache_gives_what_a_run_gives(one):
    model, whole = one.host.model, one
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([TOKENS, TOKENS[::-1]]))
    host = whole.host
    asked = [tokenize(host, Prompt(tokens=tokens)) for tokens in (TOKENS, TOKENS[::-1])]
    found = capture_all(host, asked, cache)
    torch.testing.assert_close(found[0].mlp_post, whole.captured.mlp_post, rtol=0, atol=1e-6)
    other = capture_all(host, asked[1:])[0]
    torch.testing.assert_close(found[1].mlp_post, other.mlp_post, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1]])
def test_a_cache_without_its_batch_axis_does_too(tokens):
    model = bridge_of("mixtral")
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([tokens]))
    found = attribute(model, tokens, target=TARGET, top=5, cache=cache.remove_batch_dim())
    wanted = attribute(model, tokens, target=TARGET, top=5)
    assert torch.equal(found.ffn_neurons.score, wanted.ffn_neurons.score)


def test_a_cache_of_one_prompt_is_not_taken_for_two():
    model = bridge_of("mixtral")
    host = open_host(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    asked = [tokenize(host, Prompt(tokens=TOKENS[:3]))] * 2
    with pytest.raises(InputError, match="holds 1 prompt"):
        capture_all(host, asked, cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_scored_in_float32(one, dtype):
    found = attribute(bridge_of("qwen2moe", dtype=dtype), TOKENS, target=TARGET, top=ALL)
    wide = one
    assert found.ffn_neurons.score.dtype == torch.float32
    table = found.neurons("ffn").merge(wide.neurons("ffn"), on=["layer", "index"])
    assert len(table) == 3 * (4 * 16 + 20)
    assert table["score_x"].corr(table["score_y"]) > 0.98


def test_products_read_the_experts_that_are_on_alone(definition, whole):
    for layer in LAYERS:
        W_out = ffn_decomposition(whole.host, whole.captured, layer).W_out
        shared = {whole.host.n_experts} if whole.host.mixture(layer).d_shared else set()
        assert W_out.of_use == {*definition.routed(layer, -1)} | shared
    W_out = whole.host.W_out(0)
    assert {stack.untyped_storage().data_ptr() for stack in W_out.stacks} <= {
        weight.untyped_storage().data_ptr() for weight in model_weights(whole.host)
    }  # views, not copies


def model_weights(host):
    return [*host.model.parameters()]


def test_the_index_bounds_and_lists_experts_neurons_like_others(one, tmp_path):
    model = one.host.model
    found = attribute(model, TOKENS, target=TARGET, top=12, index=projection_index(model, tmp_path))
    dense = torch.stack([neuron_scores(block, found.out, found.target) for block in found.ffns])
    between = found.intervals("ffn")
    assert ((between.lower <= dense + 1e-6) & (dense <= between.upper + 1e-6)).all()
    wanted = dense.flatten().sort().values[:12]
    lowest = found.suppressing_neurons["ffn"].score
    torch.testing.assert_close(lowest, wanted, rtol=0, atol=1e-6)


@pytest.mark.changes("the weights")
def test_the_hash_of_the_weights_knows_every_expert(editable):
    host = open_host(editable)
    before = weights_hash(host)
    with torch.no_grad(), edit_weights(editable, scale(FFNNeuron(2, host.d_expert + 1), 2.0)):
        assert weights_hash(host) != before
    assert weights_hash(host) == before


# --- the query side ---------------------------------------------------------------------------


def test_query_shares_sum_to_the_pre_activations_of_gate_and_up(definition, whole):
    scores = whole.query_scores("ffn", top_values=40)
    rows, (values,) = scores.inputs, scores.values
    block = definition.hf.model.layers
    for row, name in enumerate(rows.input):
        place = int(rows.value[row])
        layer, index = int(values.layer[place]), int(values.index[place])
        expert, number = whole.host.expert_of(index)
        mlp, x = block[layer].mlp, definition.seen["read", layer][-1]
        if expert == whole.host.n_experts:
            weight = getattr(mlp.shared_expert, f"{name}_proj").weight[number]
        else:
            weight = mlp.experts.gate_up_proj[expert].chunk(2)[name == "up"][number]
        wanted = float(weight.double() @ x)
        found = float(rows.parts[row].sum() + rows.bias[row])
        assert found == pytest.approx(wanted, abs=1e-5 * float(rows.absolute[row]))
        assert values.coefficient[place] != 0  # what is off is worth nothing to set off
    for layer in LAYERS:
        total = scores.ffn_neurons[layer].sum()
        torch.testing.assert_close(total, scores.ffn[layer], rtol=0, atol=1e-5)


# --- interventions ----------------------------------------------------------------------------


def logits_without(family, layer, expert, number):
    """Hugging Face's own, with a column of an expert's down projection at 0."""
    class_name, config = MIXTURES[family]
    hf = hugging_face_model(class_name, config())
    mlp = hf.model.layers[layer].mlp
    with torch.no_grad():
        if expert == mlp.experts.num_experts:
            mlp.shared_expert.down_proj.weight[:, number] = 0.0
        else:
            mlp.experts.down_proj[expert, :, number] = 0.0
        return hf(torch.tensor([TOKENS])).logits


@pytest.mark.changes("the weights")
@pytest.mark.parametrize("way", [intervened, edit_weights])
def test_zeroing_a_neuron_is_zeroing_its_row(family, editable, whole, way):
    model = editable
    best = whole.ffn_neurons.neurons()
    chosen = {whole.host.expert_of(each.index)[0]: each for each in best[:40] if each.layer == 1}
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        before = model(tokens)
        for neuron in chosen.values():
            with torch.random.fork_rng():
                wanted = logits_without(family, 1, *whole.host.expert_of(neuron.index))
            with way(model, zero(neuron)):
                found = model(tokens)
            assert not torch.equal(found, before)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert torch.equal(model(tokens), before)


def test_what_happens_at_one_position_happens_there_alone(one):
    model, whole = one.host.model, one
    neuron = next(each for each in whole.ffn_neurons.neurons() if each.layer == 0)
    host, tokens = whole.host, torch.tensor([TOKENS])
    before = {}
    with torch.no_grad():
        _, plain = model.run_with_cache(tokens)
        with intervened(model, scale(neuron, 3.0, position=-1)):
            _, edited = model.run_with_cache(tokens)
    for name in ("blocks.0.hook_mlp_out",):
        before, after = plain[name][0], edited[name][0]
    assert torch.equal(before[:-1], after[:-1])
    row = host.W_out(0)[(torch.tensor([neuron.index]),)][0]
    added = 2 * whole.captured.mlp_post[0, neuron.index] * row
    torch.testing.assert_close(after[-1] - before[-1], added, rtol=0, atol=1e-6)


def test_a_capture_without_neurons_still_meets_every_identity(one):
    whole = one
    best = whole.ffn_neurons.neurons()[:5]
    prompt = whole.captured.prompt
    (found,) = capture_zeroed(whole.host, [prompt], [zero(best)])
    assert all(found.mlp_post[each.layer, each.index] == 0 for each in best)
    for identity in identities(whole.host, found):
        assert identity.error < 5e-6, identity


def test_means_are_those_of_coefficients_at_all_positions(one):
    model, whole = one.host.model, one
    means = mean_coefficients(model, [list(TOKENS)])
    sources = capture_sources(whole.host, whole.captured, range(len(TOKENS)))
    torch.testing.assert_close(means.ffn, sources.mlp_post.mean(1), rtol=0, atol=1e-6)
    neuron = whole.ffn_neurons.neurons()[0]
    with torch.no_grad(), intervened(model, replace_mean(neuron, means)):
        model(torch.tensor([TOKENS]))


@pytest.mark.changes("the weights")
def test_a_run_whose_experts_are_edited_is_attributed_as_it_was_edited():
    """At the read position and before it, values and what fed them: as with the weights edited."""
    model = own_bridge_of("qwen2moe")
    best = attribute(model, TOKENS, target=TARGET, top=3).ffn_neurons.neurons()[0]
    with intervened(model, zero(best)):
        hooked = attribute(model, TOKENS, target=TARGET, top=10)
        fed = hooked.query_scores("attn")
    with edit_weights(model, zero(best)):
        written = attribute(model, TOKENS, target=TARGET, top=10)
        wanted = written.query_scores("attn")
    assert hooked.captured.mlp_post[best.layer, best.index] == 0, "where its row is zeroed it is on"
    written.captured.mlp_post[best.layer, best.index] = 0
    torch.testing.assert_close(hooked.captured.mlp_post, written.captured.mlp_post)
    torch.testing.assert_close(hooked.ffn_neurons.score, written.ffn_neurons.score)
    torch.testing.assert_close(fed.ffn_neurons, wanted.ffn_neurons, rtol=1e-4, atol=1e-6)


def test_edits_of_experts_neurons_compose_like_others(one):
    model, neuron = one.host.model, one.ffn_neurons.neurons()[0]

    def log_prob(*edits):
        with ExitStack() as stack, torch.no_grad():
            for edit in edits:
                stack.enter_context(intervened(model, edit))
            return float(model(torch.tensor([TOKENS]))[0, -1].log_softmax(-1)[TARGET])

    assert log_prob(zero(neuron), zero(neuron)) == pytest.approx(log_prob(zero(neuron)), abs=1e-6)
    half, quarter = scale(neuron, 0.5), scale(neuron, 0.25)
    assert log_prob(half, half) == pytest.approx(log_prob(quarter), abs=1e-6)
    assert abs(log_prob(half) - log_prob(quarter)) > 1e-4


def test_an_edit_elsewhere_is_seen_by_the_query_side(one):
    model, neuron = one.host.model, FFNNeuron(0, one.ffn_neurons.neurons()[0].index)
    with intervened(model, zero(neuron, position=2)):
        found = attribute(model, TOKENS, target=TARGET, top=5)
        scores = found.query_scores("attn")
    torch.testing.assert_close(
        scores.ffn_neurons.sum(-1), scores.ffn, rtol=1e-4, atol=1e-5, check_stride=False
    )


def test_random_controls_are_neurons_of_experts_that_ran(one):
    generator = torch.Generator().manual_seed(0)
    beside = random_neurons(one, one.ffn_neurons.first(6))
    assert (beside.coefficient != 0).all()
    chosen = torch.tensor(
        [each.layer * one.host.d_mlp + each.index for each in one.ffn_neurons.neurons()[:6]]
    )
    keys = on_first(one, "ffn", torch.rand(one.host.n_layers, one.host.d_mlp, generator=generator))
    drawn = random_beside(chosen, keys)
    assert (one.captured.mlp_post.flatten()[drawn] != 0).all() and len(drawn) == 6


def test_runs_that_were_decomposed_apart_are_bounded_by_all_their_experts(model):
    runs = [attribute(model, tokens, target=TARGET, top=8) for tokens in (TOKENS, TOKENS[::-1])]
    before = baseline_of_runs(
        [run.out for run in runs],
        [torch.stack([block.base for block in run.ffns]) for run in runs],
        [0, 1],
        [run.target for run in runs],
    )
    bounds = tangent_bounds([run.ffns for run in runs], runs[0].out, before)
    for run, of_run in zip(runs, bounds, strict=True):
        for block, bound in zip(run.ffns, of_run, strict=True):
            exact = neuron_scores(block, run.out, run.target)
            above, _ = bound.above()
            on = block.all_coefficients() != 0
            assert (above[on] >= exact[on]).all()


# --- methods ----------------------------------------------------------------------------------


@pytest.mark.changes("the weights")
def test_methods_that_run_the_model_agree_with_zeroing_rows():
    editable = own_bridge_of("qwen2moe")
    whole = attribute(editable, TOKENS, target=TARGET, top=3)
    case = Case(result=whole)
    ablated = METHODS["ablation"](case, "ffn", None)
    gradient = METHODS["gradient_activation"](case, "ffn", None)
    with torch.no_grad():
        for neuron in whole.ffn_neurons.neurons()[:3]:
            with edit_weights(editable, zero(neuron)):
                left = editable(torch.tensor([TOKENS]))[0, -1].log_softmax(-1)[TARGET]
            lost = whole.log_prob - float(left)
            assert float(ablated[neuron.layer, neuron.index]) == pytest.approx(lost, abs=1e-5)
            little = scale(neuron, 1 - 1e-2)
            with edit_weights(editable, little):
                left = editable(torch.tensor([TOKENS]))[0, -1].log_softmax(-1)[TARGET]
            slope = (whole.log_prob - float(left)) / 1e-2
            found = float(gradient[neuron.layer, neuron.index])
            assert found == pytest.approx(slope, abs=2e-3)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_scores_every_neuron(method):
    case = case_of_mixtral()
    found = METHODS[method](case, "ffn", None)
    assert found.shape == (3, 160)
    assert found.isfinite().all()


@cache
def case_of_mixtral():
    result = attribute(bridge_of("mixtral"), TOKENS, target=TARGET, top=5)
    corrupted = tokenize(result.host, Prompt(tokens=TOKENS[:-1] + (9,)))
    return Case(result=result, corrupted=corrupted)


# --- what is refused --------------------------------------------------------------------------


@needs_hooked_transformer
def test_a_hooked_transformer_with_experts_is_refused_by_name():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = dict(d_model=24, d_head=6, n_heads=4, d_mlp=40, n_layers=2, n_ctx=32, d_vocab=61)
    cfg = HookedTransformerConfig(
        **sizes,
        num_experts=4,
        experts_per_token=2,
        gated_mlp=True,
        act_fn="silu",
        normalization_type="RMS",
        original_architecture="MixtralForCausalLM",
        device="cpu",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedTransformer(cfg)
    with pytest.raises(UnsupportedModelError, match="on the bridge alone"):
        open_host(model)


def test_a_router_that_nobody_knows_is_refused_by_name():
    model = own_bridge_of("mixtral")
    model.cfg.architecture = model.cfg.original_architecture = "OtherMoeForCausalLM"
    with pytest.raises(UnsupportedModelError, match="whose router is not known; those of Mixtral"):
        open_host(model)


def test_experts_whose_shared_one_transformer_lens_mistakes_are_refused_once_folded():
    class_name, config = MIXTURES["qwen2moe"]
    as_wide = config()
    as_wide.shared_expert_intermediate_size = as_wide.hidden_size
    assert open_host(bridge_from(class_name, as_wide)).n_experts
    folded = bridge_from(class_name, as_wide, processed=True)
    with pytest.raises(UnsupportedModelError, match="as wide as the residual stream.*load it raw"):
        open_host(folded)


def test_an_ffn_of_experts_has_no_matrix_of_subkeys():
    host = open_host(bridge_of("mixtral"))
    for weight in (host.W_in, host.W_gate):
        with pytest.raises(UnsupportedModelError, match="host.ffn_inputs"):
            weight(0)
    with pytest.raises(UnsupportedModelError, match="no activation holds"):
        coefficient_name(host, 0, "ffn")
    assert coefficient_name(host, 0, "attn") == "blocks.0.attn.hook_z"


# --- plans ------------------------------------------------------------------------------------


def test_a_plan_counts_the_experts_that_are_on(family, model, whole):
    shapes = shapes_of(MIXTURES[family][1]())
    assert plan(model, n_tokens=6).shapes == shapes
    on = int((whole.captured.mlp_post != 0).sum())
    assert on == shapes.n_neurons(6)[0] == 3 * shapes.d_on < 3 * shapes.d_mlp
    matrices = [p for name, p in model.named_parameters() if "proj" in name and p.ndim > 1]
    assert shapes.n_block_weights == sum(matrix.numel() for matrix in matrices)


# --- ids --------------------------------------------------------------------------------------


def test_ids_name_a_neuron_with_its_expert_and_back(one):
    whole = one
    layout = layout_of(whole.host)
    table = whole.neurons("ffn")
    for row in table.to_dict("records")[::17]:
        neuron = FFNNeuron(row["layer"], row["index"])
        expert, number = whole.host.expert_of(row["index"])
        label = f"L{row['layer']}.E{expert}.N{number}"
        assert expert == row["expert"] and expert_id(neuron, layout) == label
        assert parse_id(label, layout).neuron == neuron
    assert whole.neurons("attn")["expert"].isna().all()


def test_every_table_of_neurons_says_which_expert_each_is_in():
    model = bridge_of("qwen2moe")
    result = attribute(model, TOKENS, target=TARGET, top=60)
    answer = attribute_answer(model, TOKENS, [7, 9], top=60)
    compared = compare(result, [FFNNeuron(0, 3)], top=60)
    tables = (
        result.neurons(),
        result.query_neurons(60),
        answer.neurons(),
        answer.neurons(by_token=True),
        compared.neurons(),
        result.query_values("both", top_values=30),
        value_query_graph(
            result, "both", kind="both", share=1.0, max_values=60, max_inputs=60
        ).node_table(),
    )
    layout = layout_of(result.host)
    for table in tables:
        of_ffn = table[table["kind"] == "ffn"]
        ids = [expert_id(neuron, layout) for neuron in neurons_of(of_ffn)]
        assert len(ids) >= 10
        assert of_ffn["expert"].tolist() == [int(each.split(".")[1][1:]) for each in ids]
        assert table.loc[table["kind"] == "attn", "expert"].isna().all()


def test_runs_over_experts_list_what_one_prompt_at_a_time_does_with_the_expert(tmp_path):
    model = bridge_of("qwen2moe")
    prompts = [Prompt(tokens=TOKENS, target=TARGET), Prompt(tokens=TOKENS[:5], target=TARGET)]
    what = {"what": ("neurons", "query_neurons", "methods"), "methods": "log_prob"}
    run = run_prompts(model, prompts, tmp_path / "run", top=40, **what)
    assert len(run.table("errors")) == 0
    wanted = [attribute(model, prompt, top=40).neurons() for prompt in prompts]
    found = run.table("neurons")
    for row, table in enumerate(wanted):
        ours = found[found["row"] == row].reset_index(drop=True)
        same = ["kind", "layer", "head", "index", "expert", "source_pos"]
        pd.testing.assert_frame_equal(ours[same], table[same], check_dtype=False)
        assert (ours["score"] - table["score"]).abs().max() < 1e-6
    assert found.loc[found["kind"] == "ffn", "expert"].nunique() > 1
    numbers = open_host(model)
    summary = run.summary()
    assert summary.methods is not None
    for table in (
        run.table("query_neurons"),
        run.table("methods"),
        summary.neurons,
        summary.methods,
    ):
        of_ffn = table[table["kind"] == "ffn"]
        experts = [numbers.expert_of(index)[0] for index in of_ffn["index"]]
        assert len(of_ffn) > 20 and of_ffn["expert"].tolist() == experts
        assert table.loc[table["kind"] == "attn", "expert"].isna().all()
    assert "expert" in pd.read_parquet(tmp_path / "run" / "summary.parquet")
    assert "expert" not in run.table("neurons", columns=["kind", "index"])
    assert "expert" not in run.table("answers")
    # a file tells a reader who has it alone how its numbers divide into experts
    metadata = pq.read_schema(next((tmp_path / "run" / "neurons").iterdir())).metadata
    facts = json.loads(metadata[b"tl_neuron_attr"])
    assert facts["model"]["n_experts"] == numbers.n_experts
    assert facts["model"]["d_expert"] == numbers.d_expert
    assert (
        f"{numbers.n_experts} experts of {numbers.d_expert} neurons" in facts["neuron_basis"]["ffn"]
    )


def test_the_id_of_an_experts_neuron_is_no_label_and_says_what_to_give():
    with pytest.raises(InputError, match=r"give parse_id\('L0.E1.N3', layout_of\(open_host"):
        zero("L0.E1.N3")


def test_ids_that_name_no_neuron_of_an_expert_are_refused():
    layout = layout_of(open_host(bridge_of("qwen2moe")))
    for text, reason in (
        ("L0.E5.N0", "4 experts of 16 neurons, and a shared one of 20"),
        ("L0.E1.N16", "there is no L0.E1.N16"),
        ("L3.E1.N1", "no layer 3"),
        ("blocks.0.mlp.hook_post[3]", "not its neurons"),
        ("model.layers.0.mlp.down_proj.input[3]", "no module has its neurons"),
    ):
        with pytest.raises(InputError, match=reason):
            parse_id(text, layout)
    unit = Unit(FFNNeuron(0, 3), "post")
    for convert in (hook_id, module_id):
        with pytest.raises(InputError, match="mixture of experts"):
            convert(unit, layout)
    with pytest.raises(InputError, match="how EasyEdit numbers them"):
        from_pair("EasyEdit", 0, 3, layout)
    attn = Unit(AttnNeuron(1, 2, 3), "z")
    assert module_id(attn, layout) == "model.layers.1.self_attn.o_proj.input[15]"
    dense = layout_of(open_host(bridge_of("llama")))
    with pytest.raises(InputError, match="has no experts"):
        parse_id("L0.E1.N1", dense)
    with pytest.raises(InputError, match="has no experts"):
        expert_id(FFNNeuron(0, 1), dense)


# --- a matrix in pieces -----------------------------------------------------------------------


def in_pieces():
    generator = torch.Generator().manual_seed(0)
    stacks = (torch.randn(3, 2, 5, generator=generator), torch.randn(1, 4, 5, generator=generator))
    return Pieces(stacks), torch.cat([stack.flatten(0, 1) for stack in stacks])


def test_a_matrix_in_pieces_computes_as_one():
    pieces, whole = in_pieces()
    assert pieces.shape == whole.shape == torch.Size((10, 5)) and len(pieces) == 10
    vectors = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(times(vectors, pieces), vectors @ whole)
    torch.testing.assert_close(slopes(pieces, vectors[:, :5]), vectors[:, :5] @ whole.T)
    some = torch.tensor([9, 0, 5, 6, 5])
    assert torch.equal(pieces[(some,)], whole[some])
    assert torch.equal(torch.cat([*pieces.split(3)]), whole)
    assert str(pieces) == "Pieces(10 x 5, in 4 matrices)"


def test_matrices_that_are_of_no_use_count_as_zeros_in_products_alone():
    pieces, whole = in_pieces()
    used = pieces.using({1, 3})
    whole = whole.clone()
    whole[[0, 1, 4, 5]] = 0.0
    torch.testing.assert_close(slopes(used, torch.ones(1, 5)), torch.ones(1, 5) @ whole.T)
    torch.testing.assert_close(times(torch.ones(10), used), torch.ones(10) @ whole)
    every = torch.arange(10)
    assert torch.equal(used[(every,)], pieces[(every,)])


def test_rows_are_written_to_where_they_lie():
    pieces, whole = in_pieces()
    some = torch.tensor([7, 1])
    pieces[(some,)] = torch.ones(2, 5)
    assert pieces.stacks[1][0, 1].eq(1).all() and pieces.stacks[0][0, 1].eq(1).all()
    others = torch.tensor([0, 2, 3, 4, 5, 6, 8, 9])
    assert torch.equal(pieces[(others,)], whole[others])


@pytest.mark.parametrize("family", MIXTURES)
def test_weights_of_experts_are_rounded_as_hugging_face_rounds_them(family):
    model = bridge_of(family, dtype=torch.bfloat16)
    mixture = open_host(model).mixture(0)
    wanted = torch.float32 if family == "mixtral" else torch.bfloat16
    logits = torch.randn(5, mixture.n_experts, generator=torch.Generator().manual_seed(0))
    weights, chosen = routed(mixture, logits)
    assert weights.dtype == mixture.weights_dtype == wanted
    p, order = logits.double().softmax(-1).sort(descending=True)
    k = mixture.per_position
    assert torch.equal(chosen, order[:, :k])
    p = p[:, :k] / p[:, :k].sum(-1, keepdim=True) if mixture.sums_to_one else p[:, :k]
    torch.testing.assert_close(weights.double(), p, rtol=4e-3, atol=0)
    assert mixture.sums_to_one is (family in ("mixtral", "qwen3moe"))


def test_a_shared_expert_without_a_router_is_added_as_it_is():
    mixture = open_host(bridge_of("qwen2moe")).mixture(0)
    mixture = replace(
        mixture,
        shared_router=None,
        d_shared=7,
        **{
            name: Pieces(
                (getattr(mixture, name).stacks[0], getattr(mixture, name).stacks[1][:, :7])
            )
            for name in ("down", "gate", "up")
        },
    )
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(3, 24, generator=generator)
    found = coefficients(mixture, read, torch.randn(3, 4, generator=generator))
    gate, up = mixture.gate.stacks[1][0], mixture.up.stacks[1][0]
    torch.testing.assert_close(found[:, -7:], mixture.act(read @ gate.T) * (read @ up.T))
    assert found.shape == (3, 4 * 16 + 7)
    on = experts_on(mixture, found)
    assert on == frozenset([*on & frozenset(range(4)), 4])
