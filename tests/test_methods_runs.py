"""Methods that run the model: against plain autograd, captum, and a loop of single forwards."""

import warnings
from functools import partial

import pytest
import torch
from conftest import (
    TOKENS,
    bridge_of,
    bundled_model,
    hooked_of,
    needs_hooked_transformer,
    own_bridge_of,
)
from test_methods import KINDS, TARGET, case_of

from tl_neuron_attr import (
    InputError,
    NonFiniteError,
    Prompt,
    attribute,
    forward,
    open_host,
    tokenize,
)
from tl_neuron_attr.hook_points import hook_names
from tl_neuron_attr.methods import METHODS, Case, method_name, method_of, neuron_shape
from tl_neuron_attr.methods.ablation import ablation
from tl_neuron_attr.methods.gradients import integrated_gradients
from tl_neuron_attr.methods.together import query, value_and_query

RUNNING = (
    "gradient_activation",
    "integrated_gradients",
    "attribution_patching",
    "query",
    "value_and_query",
    "ablation",
)
READ = len(TOKENS) - 1


def name_of(host, layer, kind):
    return hook_names(host, layer)["mlp_post" if kind == "ffn" else "z"]


def log_probs(model, tokens, name, put):
    """log p of every token at the last position, ``put`` in place of one activation: plain."""
    hooks = [(name, lambda activation, hook: put.to(activation))]
    logits = model.run_with_hooks(torch.tensor([tokens] * len(put)), fwd_hooks=hooks)
    return logits[:, -1].log_softmax(-1)


def activation_of(model, tokens, name):
    with torch.no_grad():
        return model.run_with_cache(torch.tensor([tokens]))[1][name].clone()


def by_autograd(host, kind, quantity):
    """Each layer's activations, and the gradient of what ``quantity`` makes of log p."""
    found = []
    for layer in range(host.n_layers):
        name = name_of(host, layer, kind)
        leaf = activation_of(host.model, TOKENS, name).requires_grad_()
        value = quantity(log_probs(host.model, TOKENS, name, leaf)[0])
        found.append((leaf.detach()[0], torch.autograd.grad(value, leaf)[0][0]))
    return found


def single_forwards(host, kind, layer, neuron):
    """log p(target) before less after, the neuron zeroed at all positions, in a run of its own."""

    def without(activation, hook):
        activation = activation.clone()
        activation[(slice(None), slice(None), *neuron)] = 0
        return activation

    with torch.no_grad():
        runs = [
            host.model.run_with_hooks(torch.tensor([TOKENS]), fwd_hooks=hooks)[0, -1]
            for hooks in ([], [(name_of(host, layer, kind), without)])
        ]
    before, after = (float(logits.double().log_softmax(-1)[TARGET]) for logits in runs)
    return before - after


# --- every family -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_gets_finite_scores_and_ablation_is_that_of_single_forwards(any_model, kind):
    case = case_of(any_model)
    host = case.result.host
    for name in RUNNING:
        scores = METHODS[name](case, kind, None)
        assert scores.shape == neuron_shape(host, kind), name
        assert scores.dtype == torch.float32 and scores.isfinite().all(), name
        assert not scores.requires_grad and scores.unique().numel() > 10, name
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randperm(scores.numel(), generator=generator)[:2]
    most = scores.flatten().abs().topk(2).indices
    for number in [*drawn.tolist(), *most.tolist()]:
        layer, *neuron = (int(i) for i in torch.unravel_index(torch.tensor(number), scores.shape))
        wanted = single_forwards(host, kind, layer, neuron)
        assert float(scores[layer][tuple(neuron)]) == pytest.approx(wanted, abs=2e-5)
    assert all(weight.grad is None for weight in any_model.parameters())


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_both_classes_give_the_same_scores(family):
    ours, theirs = case_of(bridge_of(family)), case_of(hooked_of(family))
    for name in RUNNING:
        for kind in KINDS:
            one, other = (METHODS[name](case, kind, None) for case in (ours, theirs))
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# --- ablation ---------------------------------------------------------------------------------


def test_ablation_is_a_loop_of_single_forwards(tiny_model, monkeypatch):
    monkeypatch.setattr(forward, "_TOKENS_AT_A_TIME", 100)
    case = case_of(tiny_model)
    host = case.result.host
    for kind in KINDS:
        scores = ablation(case, kind, None)
        for number in range(0, scores.numel(), 11):
            at = torch.unravel_index(torch.tensor(number), scores.shape)
            layer, *neuron = (int(i) for i in at)
            wanted = single_forwards(host, kind, layer, neuron)
            assert float(scores[at]) == pytest.approx(wanted, abs=2e-5)


def test_ablation_of_a_contrast_is_the_difference_of_two():
    model = bridge_of("gpt2")
    one, other = (METHODS["ablation"](case_of(model, target=t), "ffn", None) for t in (9, 11))
    both = METHODS["ablation"](case_of(model, target=9, against=11), "ffn", None)
    torch.testing.assert_close(both, one - other, rtol=1e-4, atol=1e-5)


def test_a_model_that_breaks_without_a_neuron_is_refused():
    model = own_bridge_of("gpt2")
    case = case_of(model)
    with torch.no_grad():
        for name in ("ablation", "gradient_activation", "integrated_gradients"):
            model.blocks[1].mlp.W_out[3] += 1
            with pytest.raises(InputError, match="no longer gives"):
                METHODS[name](case, "ffn", None)
        model.blocks[2].mlp.W_out[3] = torch.inf
        with pytest.raises((InputError, NonFiniteError)):
            METHODS["ablation"](case, "ffn", None)


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_times_activation_is_plain_autograd(tiny_model, kind):
    case = case_of(tiny_model)
    found = METHODS["gradient_activation"](case, kind, None)
    by_hand = by_autograd(case.result.host, kind, lambda log_p: log_p[TARGET])
    wanted = torch.stack([(activation * gradient).sum(0) for activation, gradient in by_hand])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    contrast = METHODS["gradient_activation"](case_of(tiny_model, against=11), kind, None)
    by_hand = by_autograd(case.result.host, kind, lambda log_p: log_p[TARGET] - log_p[11])
    wanted = torch.stack([(activation * gradient).sum(0) for activation, gradient in by_hand])
    torch.testing.assert_close(contrast, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_times_activation_is_what_a_slightly_weaker_neuron_loses(kind):
    model = bridge_of("gpt2", dtype=torch.float64)
    case = case_of(model)
    scores = METHODS["gradient_activation"](case, kind, None)
    assert scores.dtype == torch.float64
    host, step = case.result.host, 1e-4
    for layer in range(host.n_layers):
        name = name_of(host, layer, kind)
        clean = activation_of(model, TOKENS, name)
        for number in (0, 7, 13):
            neuron = (number,) if kind == "ffn" else (number % 3, number % 8)
            ends = []
            for scale in (1 + step, 1 - step):
                put = clean.clone()
                put[(0, slice(None), *neuron)] *= scale
                with torch.no_grad():
                    ends.append(log_probs(model, TOKENS, name, put)[0, TARGET])
            slope = float(ends[0] - ends[1]) / (2 * step)
            assert float(scores[layer][neuron]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_attribution_patching_is_the_change_of_activation_times_the_clean_gradient(
    tiny_model, kind
):
    case = case_of(tiny_model)
    host = case.result.host
    found = METHODS["attribution_patching"](case, kind, None)
    by_hand = by_autograd(host, kind, lambda log_p: log_p[TARGET])
    for layer, (clean, gradient) in enumerate(by_hand):
        other = activation_of(tiny_model, case.corrupted.tokens, name_of(host, layer, kind))[0]
        wanted = ((clean - other) * gradient).sum(0)
        torch.testing.assert_close(found[layer], wanted, rtol=1e-4, atol=1e-6)


def test_without_a_corrupted_prompt_there_is_no_attribution_patching(tiny_gpt2):
    case = Case(result=attribute(tiny_gpt2, TOKENS, target=TARGET, top=1))
    with pytest.raises(InputError, match="needs a corrupted prompt"):
        METHODS["attribution_patching"](case, "ffn", None)


@pytest.mark.changes("the weights", "the bytes of the weights")
def test_a_neuron_that_speaks_for_the_answer_in_the_clean_prompt_alone_is_patched_first():
    model = own_bridge_of("opt")  # ReLU: some neurons are off in one of the prompts
    case = case_of(model)
    host = case.result.host
    with torch.no_grad():
        runs = [
            activation_of(model, tokens, name_of(host, 2, "ffn"))[0, -1]
            for tokens in (TOKENS, case.corrupted.tokens)
        ]
        index = int((runs[0] - runs[1]).argmax())
        out = case.result.out
        (direction,) = out.directions(torch.tensor([TARGET]), out.norm_scale)
        model.blocks[2].mlp.W_out[index] = 5 * direction / direction.norm()
    case = case_of(model)
    for name in ("attribution_patching", "gradient_activation", "ablation", "value_and_query"):
        scores = METHODS[name](case, "ffn", None)
        assert scores[2, index] == scores.max() > 0, name


# --- integrated gradients ---------------------------------------------------------------------


class FromActivation(torch.nn.Module):
    """The model as a function of one layer's activations: what captum is asked about."""

    def __init__(self, host, kind, layer, positions, quantity):
        super().__init__()
        self.put = torch.nn.Identity()
        self.name = name_of(host, layer, kind)
        self.__dict__ |= {"host": host, "positions": positions, "quantity": quantity}
        self.clean = activation_of(host.model, TOKENS, self.name)

    def forward(self, activation):
        put = self.put(activation)
        if self.positions == "read":
            earlier = self.clean[:, :-1].expand(len(put), *self.clean[:, :-1].shape[1:])
            put = torch.cat([earlier, put], 1)
        log_p = log_probs(self.host.model, TOKENS, self.name, put)[:, TARGET]
        return log_p.exp() if self.quantity == "prob" else log_p


@pytest.mark.parametrize(("positions", "quantity"), [("read", "prob"), ("all", "log_prob")])
@pytest.mark.parametrize("kind", KINDS)
def test_integrated_gradients_are_captum_s(tiny_model, kind, positions, quantity):
    from captum.attr import LayerConductance, LayerIntegratedGradients

    case = case_of(tiny_model)
    found = integrated_gradients(case, kind, None, positions=positions, quantity=quantity)
    for layer in range(case.result.host.n_layers):
        asked = FromActivation(case.result.host, kind, layer, positions, quantity)
        activation = asked.clean if positions == "all" else asked.clean[:, -1:]
        integrated = LayerIntegratedGradients(asked, asked.put).attribute(
            activation,
            baselines=torch.zeros_like(activation),
            n_steps=20,
            method="riemann_right",
        )
        # conductance takes gradients where each step begins: from the activation down to 0
        down = LayerConductance(asked, asked.put).attribute(
            torch.zeros_like(activation),
            baselines=activation,
            n_steps=20,
            method="riemann_trapezoid",
        )
        for theirs in (integrated, -down):
            wanted = theirs.detach()[0].sum(0)
            torch.testing.assert_close(found[layer], wanted, rtol=1e-4, atol=1e-6)


def test_knowledge_neurons_convention_is_the_default(tiny_gpt2):
    case = case_of(tiny_gpt2)
    default = METHODS["integrated_gradients"](case, "ffn", None)
    told = integrated_gradients(case, "ffn", steps=20, positions="read", quantity="prob")
    assert torch.equal(default, told)


@pytest.mark.parametrize(("kind", "positions"), [("ffn", "read"), ("attn", "all")])
def test_integrated_gradients_of_a_layer_sum_to_what_the_layer_changes(kind, positions):
    case = case_of(bridge_of("llama", dtype=torch.float64))
    host = case.result.host
    scores = integrated_gradients(case, kind, steps=250, positions=positions, quantity="log_prob")
    for layer in range(host.n_layers):
        asked = FromActivation(host, kind, layer, positions, "log_prob")
        full = asked.clean if positions == "all" else asked.clean[:, -1:]
        with torch.no_grad():
            rise = float(asked(full) - asked(torch.zeros_like(full)))
        assert float(scores[layer].sum()) == pytest.approx(rise, abs=1e-2 * max(1, abs(rise)))


def test_steps_in_several_passes_give_the_same(tiny_gpt2, monkeypatch):
    case = case_of(tiny_gpt2)
    for kind in KINDS:
        at_once = METHODS["integrated_gradients"](case, kind, None)
        with monkeypatch.context() as patch:
            patch.setattr(forward, "_TOKENS_AT_A_TIME", 7 * len(TOKENS))
            apart = METHODS["integrated_gradients"](case, kind, None)
        torch.testing.assert_close(at_once, apart, rtol=1e-4, atol=1e-7)


def test_probability_of_a_contrast_is_the_difference_of_two(tiny_gpt2):
    one, other, both = (
        METHODS["integrated_gradients"](case_of(tiny_gpt2, **options), "ffn", None)
        for options in ({"target": 9}, {"target": 11}, {"target": 9, "against": 11})
    )
    torch.testing.assert_close(both, one - other, rtol=1e-4, atol=1e-7)


def test_no_steps_are_refused(tiny_gpt2):
    with pytest.raises(InputError, match="steps must be at least 1"):
        integrated_gradients(case_of(tiny_gpt2), "ffn", None, steps=0)


# --- what gradients leave behind --------------------------------------------------------------


@pytest.mark.changes("requires_grad", "the gradients (.grad)")
@pytest.mark.parametrize("flag", [True, False])
def test_flags_and_gradients_of_the_weights_stay_as_they_are(flag):
    model = own_bridge_of("llama")
    wanted = METHODS["gradient_activation"](case_of(model), "ffn", None)
    weights = [*model.parameters()]
    for weight in weights:
        weight.requires_grad_(flag)
    weights[0].grad = torch.ones_like(weights[0])
    case = case_of(model)
    for mode in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with mode:
            for name in ("gradient_activation", "integrated_gradients", "attribution_patching"):
                scores = METHODS[name](case, "ffn", None)
                assert not scores.requires_grad
                if name == "gradient_activation":
                    assert torch.equal(scores, wanted)
    assert all(weight.requires_grad is flag for weight in weights)
    assert (weights[0].grad == 1).all() and all(weight.grad is None for weight in weights[1:])


def test_a_prompt_read_before_its_end_is_read_there(tiny_gpt2):
    whole = case_of(tiny_gpt2, TOKENS[:4])
    early = Case(
        result=attribute(tiny_gpt2, TOKENS, target=TARGET, top=5, position=3),
        corrupted=tokenize(whole.result.host, Prompt(tokens=(*TOKENS[:1], 30, *TOKENS[2:]))),
    )
    for name in RUNNING:
        for kind in KINDS:
            one, other = (METHODS[name](case, kind, None) for case in (whole, early))
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# --- query, and value and query ---------------------------------------------------------------


def test_query_scores_are_those_of_the_tables(tiny_model):
    result = case_of(tiny_model).result
    table = result.query_neurons(10_000, None)
    for kind in KINDS:
        scores = query(Case(result=result), kind)
        summed = torch.zeros_like(scores)
        for row in table[table["kind"] == kind].itertuples():
            place = (row.index,) if kind == "ffn" else (int(row.head), row.index)
            summed[(row.layer, *place)] += row.score
            near = {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(scores, summed, **near)


@pytest.mark.parametrize("family", ["llama", "opt"])  # in the second, neurons are off
def test_value_and_query_is_the_sum_of_both_and_its_best_are_certified(family):
    case = case_of(bridge_of(family))
    for kind in KINDS:
        summed = METHODS["log_prob_increase"](case, kind, None) + query(case, kind, of="both")
        every = value_and_query(case, kind)
        torch.testing.assert_close(every, summed, rtol=1e-4, atol=1e-6)
        for top in (1, 6, 35):
            best = value_and_query(case, kind, top)
            assert best.isfinite().sum() == top
            torch.testing.assert_close(
                best.flatten().topk(top).values, every.flatten().topk(top).values
            )


def test_earlier_positions_are_seen_by_running_methods_and_by_query_scores():
    case = case_of(bridge_of("opt"))  # ReLU
    host = case.result.host
    off_here = case.result.captured.mlp_post == 0
    everywhere = torch.stack(
        [
            activation_of(host.model, TOKENS, name_of(host, layer, "ffn"))[0]
            for layer in range(host.n_layers)
        ]
    )
    earlier = off_here & (everywhere != 0).any(1)
    earlier[-1] = False  # after the last attention nothing moves on
    for name in ("gradient_activation", "value_and_query", "ablation"):
        assert (METHODS[name](case, "ffn", None)[earlier] != 0).float().mean() > 0.9, name
    for name in ("log_prob_increase", "direct_logit", "integrated_gradients", "coefficient"):
        assert (METHODS[name](case, "ffn", None)[earlier] == 0).all(), name


def test_where_nothing_is_fed_there_are_no_query_scores(tiny_gpt2):
    case = case_of(tiny_gpt2)
    with pytest.raises(InputError, match="come after no ffn neuron"):
        query(case, "ffn", of="L0.H1.D3@2")
    with pytest.raises(InputError, match="come after no attn neuron"):
        query(case, "attn", of="L0.H1.D3@2")
    direct = METHODS["log_prob_increase"](case, "attn", None)
    torch.testing.assert_close(value_and_query(case, "attn", of="L0.H1.D3@2"), direct)


def test_ill_conditioned_value_neurons_alone_give_no_query_scores(tiny_gpt2, monkeypatch):
    from tl_neuron_attr import reading

    monkeypatch.setattr(reading, "ILL_CONDITIONED", 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="ill-conditioned"):
            query(case_of(tiny_gpt2), "ffn")


def test_weights_in_16_bits_give_scores_in_32():
    case = case_of(bridge_of("gpt2", dtype=torch.bfloat16))
    exact = case_of(bridge_of("gpt2"))
    for name in METHODS:
        for kind in KINDS:
            scores = METHODS[name](case, kind, None)
            assert scores.dtype == torch.float32 and scores.isfinite().all(), name
    for kind in KINDS:
        one, other = (
            METHODS["gradient_activation"](each, kind, None).flatten() for each in (case, exact)
        )
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.98


def test_a_partial_of_a_method_is_a_method(tiny_gpt2):
    own = partial(integrated_gradients, positions="all")
    assert method_of(own) is own
    assert method_name(own) == "integrated_gradients(positions='all')"


@pytest.mark.parametrize(
    "name", ["gradient_activation", "integrated_gradients", "attribution_patching"]
)
def test_weights_made_under_inference_mode_have_no_gradients_and_it_is_said(name):
    with torch.inference_mode():
        model = own_bridge_of("gpt2")
        result = attribute(model, TOKENS, top=2)
    case = Case(
        result=result, corrupted=tokenize(open_host(model), Prompt(tokens=(4, *TOKENS[1:])))
    )
    with pytest.raises(InputError, match="made under torch.inference_mode"):
        METHODS[name](case, "ffn", None)


@pytest.mark.slow
def test_ablation_of_a_confident_answer_is_not_lost_in_the_rounding_of_its_log_probability():
    """In float32, what most neurons do to an answer of p = .999 is less than log p's rounding."""
    model = bundled_model()
    result = attribute(model, "The color of snow is", target=" white", top=2)
    assert result.log_prob > -0.01
    found = METHODS["ablation"](Case(result=result), "ffn", None).flatten().double()
    wide = bundled_model(dtype=torch.float64)
    exact = attribute(wide, "The color of snow is", target=" white", top=2)
    exact = METHODS["ablation"](Case(result=exact), "ffn", None).flatten()
    live = exact.abs() > 0
    ranks = [each[live].argsort().argsort().double() for each in (found, exact)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.999
