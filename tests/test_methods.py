"""Static methods are what they say: against plain loops in float64, in every family."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from conftest import TOKENS, bridge_of, hooked_of, needs_hooked_transformer, own_bridge_of
from hypothesis import given
from hypothesis import strategies as st

from tl_neuron_attr import (
    AttnNeuron,
    FFNNeuron,
    InputError,
    Prompt,
    attribute,
    attribute_all,
    best_neurons,
    open_host,
    tokenize,
)
from tl_neuron_attr.methods import LETTERS, METHODS, Case, method_name, method_of, neuron_shape

STATIC = (*LETTERS.values(), "direct_logit")
KINDS = ("ffn", "attn")
TARGET = 9


def case_of(model, tokens=TOKENS, **options):
    options = {"target": TARGET, "top": 5, **options}
    corrupted = tokenize(open_host(model), Prompt(tokens=(*tokens[:1], 30, *tokens[2:])))
    return Case(result=attribute(model, tokens, **options), corrupted=corrupted)


# --- by definition ----------------------------------------------------------------------------


class ByHand:
    """One neuron at a time, in float64, from the capture and the weights."""

    def __init__(self, case, kind):
        result, host = case.result, case.result.host
        self.host, self.target = host, result.target.id
        self.captured = result.captured.to(torch.float64)
        self.W_U = host.W_U.double()
        self.gain = host.final_gain.double()
        self.bias = 0 if host.final_bias is None else host.final_bias.double()
        self.b_U = 0 if host.b_U is None else host.b_U.double()
        self.kind = kind

    def norm_of(self, vector, bias):
        final = self.captured.resid_final
        if self.host.norm == "layer_norm":
            scale = (final.var(unbiased=False) + self.host.eps).sqrt()
            vector = vector - vector.mean()
        else:
            scale = (final.pow(2).mean() + self.host.eps).sqrt()
        return vector / scale * self.gain + (self.bias if bias else 0)

    def log_prob(self, vector):
        return (self.norm_of(vector, True) @ self.W_U + self.b_U).log_softmax(-1)[self.target]

    def neurons(self):
        """Index, base, coefficient and subvalue of each neuron."""
        captured = self.captured
        for layer in range(self.host.n_layers):
            if self.kind == "ffn":
                mid = captured.resid_mid
                base = (captured.resid_pre if mid is None else mid)[layer]
                for index, row in enumerate(self.host.W_out(layer).double()):
                    yield (layer, index), base, captured.mlp_post[layer, index], row
            else:
                base = captured.resid_pre[layer]
                for head, rows in enumerate(self.host.W_O(layer).double()):
                    for index, row in enumerate(rows):
                        yield (layer, head, index), base, captured.z[layer, head, index], row

    def score(self, name, base, coefficient, subvalue):
        contribution = coefficient * subvalue
        if name == "log_prob_increase":
            return self.log_prob(base + contribution) - self.log_prob(base)
        if name == "log_prob":
            return self.log_prob(contribution)
        if name == "prob_increase":
            return self.log_prob(base + contribution).exp() - self.log_prob(base).exp()
        if name == "direct_logit":
            return self.norm_of(contribution, False) @ self.W_U[:, self.target]
        size = sum(float(x) ** 2 for x in subvalue) ** 0.5
        if name == "norm":
            return size
        if name == "coefficient":
            return abs(coefficient)
        if name == "coefficient_norm":
            return abs(coefficient) * size
        logits = (self.norm_of(contribution, False) @ self.W_U).tolist()
        order = sorted(range(len(logits)), key=lambda token: -logits[token])
        place = order.index(self.target) + 1 if any(logits) else len(logits)
        return 1 / place if name == "rank" else float(abs(coefficient)) / place


@pytest.mark.parametrize("kind", KINDS)
def test_every_static_method_is_its_definition_one_neuron_at_a_time(tiny_model, kind):
    case = case_of(tiny_model, dtype=torch.float64)
    by_hand = ByHand(case, kind)
    found = {name: METHODS[name](case, kind, None) for name in STATIC}
    for place, base, coefficient, subvalue in by_hand.neurons():
        for name in STATIC:
            wanted = float(by_hand.score(name, base, coefficient, subvalue))
            # z was summed by the model in float32
            assert float(found[name][place]) == pytest.approx(wanted, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_gets_one_finite_score_a_neuron_and_its_best_are_the_best(any_model, kind):
    case = case_of(any_model)
    near = {"rtol": 1e-4, "atol": 1e-6}
    for name in STATIC:
        every = METHODS[name](case, kind, None)
        assert every.shape == neuron_shape(case.result.host, kind)
        assert every.dtype == torch.float32 and every.isfinite().all() and not every.requires_grad
        assert every.unique().numel() > 10
        for top in (4, 30):
            best = METHODS[name](case, kind, top).flatten()
            order = best.sort(descending=True, stable=True).indices[:top]
            wanted = every.flatten().sort(descending=True).values[:top]
            torch.testing.assert_close(best[order], wanted, **near)
            torch.testing.assert_close(best[order], every.flatten()[order], **near)


def test_the_certified_methods_know_few_neurons_where_few_are_asked_for(tiny_gpt2):
    case = case_of(tiny_gpt2)
    for name in "abc":
        for kind in KINDS:
            scores = method_of(name)(case, kind, 4)
            assert scores.isfinite().sum() == 4 and scores.isneginf().sum() == scores.numel() - 4


def test_the_paper_s_method_is_what_attribute_ranked(tiny_model):
    case = case_of(tiny_model, top=12)
    ranked = case.result.ffn_neurons
    scores = method_of("a")(case, "ffn", 12)
    assert torch.equal(scores[ranked.layer, ranked.index], ranked.score)
    over = case.result.attn_neurons_over_sources
    scores = method_of("a")(case, "attn", 12)
    assert torch.equal(scores[over.layer, over.head, over.index], over.score)


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_both_classes_give_the_same_scores(family):
    ours, theirs = case_of(bridge_of(family)), case_of(hooked_of(family))
    for name in STATIC:
        for kind in KINDS:
            one, other = (METHODS[name](case, kind, None) for case in (ours, theirs))
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:value biases were folded")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_direct_logit_attribution_is_transformer_lens_s(family):
    # of folded weights: of raw ones it leaves out the final norm's gain
    model = bridge_of(family, processed=True)
    case = case_of(model)
    host = case.result.host
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([TOKENS]))
        stack = cache.stack_neuron_results(layer=-1, pos_slice=-1)
        wanted = cache.logit_attrs(stack, tokens=TARGET, pos_slice=-1)[:, 0]
    found = METHODS["direct_logit"](case, "ffn", None)
    neurons = wanted[: found.numel()].view(host.n_layers, host.d_mlp)
    torch.testing.assert_close(found, neurons, rtol=1e-4, atol=1e-5)


# --- what they have in common -----------------------------------------------------------------


def test_a_neuron_that_is_off_raises_nothing_and_has_the_last_place():
    case = case_of(bridge_of("opt"))  # ReLU
    off = case.result.captured.mlp_post == 0
    assert 0.2 < off.float().mean() < 0.8
    for name in ("log_prob_increase", "prob_increase", "coefficient", "direct_logit"):
        assert (METHODS[name](case, "ffn", None)[off] == 0).all()
    assert (METHODS["rank"](case, "ffn", None)[off] == 1 / case.result.host.d_vocab).all()
    assert METHODS["log_prob"](case, "ffn", None)[off].unique().numel() == 1


def test_a_planted_neuron_ranks_first_by_what_it_says():
    model = own_bridge_of("gpt2")
    result = attribute(model, TOKENS, target=TARGET, top=1)
    index = int(result.captured.mlp_post[2].abs().argmax())
    sign = float(result.captured.mlp_post[2, index].sign())
    (direction,) = result.out.directions(torch.tensor([TARGET]), result.out.norm_scale)
    with torch.no_grad():  # it writes what is read as the target, whatever its coefficient
        model.blocks[2].mlp.W_out[index] = 30 * sign * direction / direction.norm()
    case = case_of(model)
    for name in STATIC:
        scores = METHODS[name](case, "ffn", None)
        if name != "coefficient":
            assert scores[2, index] == scores.max(), name


def test_scores_do_not_depend_on_the_batch_the_prompt_was_attributed_in(tiny_model):
    alone = case_of(tiny_model)
    prompts = [Prompt(tokens=tokens, target=TARGET) for tokens in (TOKENS, TOKENS[:3], (5, 8))]
    batched = Case(result=attribute_all(tiny_model, prompts, top=5)[0])
    for name in STATIC:
        for kind in KINDS:
            one, other = (METHODS[name](case, kind, None) for case in (alone, batched))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@given(st.integers(2_000, 200_000), st.sampled_from(STATIC), st.sampled_from(KINDS))
def test_the_budget_changes_no_score(tiny_gpt2, budget, name, kind):
    one = METHODS[name](case_of(tiny_gpt2), kind, None)
    other = METHODS[name](case_of(tiny_gpt2, budget=budget), kind, None)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("convention", ["published", "recomputed"])
def test_other_conventions_are_followed(tiny_gpt2, convention):
    case = case_of(tiny_gpt2, convention=convention)
    out, captured = case.result.out, case.result.captured
    written = captured.mlp_post[1, 4] * case.result.host.W_out(1)[4]
    base, target = captured.resid_mid[1], case.result.target
    wanted = {
        "log_prob_increase": out.log_prob(base + written, target) - out.log_prob(base, target),
        "log_prob": out.log_prob(written, target),
        "prob_increase": out.log_prob(base + written, target).exp()
        - out.log_prob(base, target).exp(),
    }
    for name, score in wanted.items():
        for top in (None, 10):
            found = METHODS[name](case, "ffn", top)[1, 4]
            assert found == -math.inf or float(found) == pytest.approx(float(score), abs=1e-5)
    exact = case_of(tiny_gpt2)
    for name in ("rank", "direct_logit"):
        torch.testing.assert_close(METHODS[name](case, "ffn", None), METHODS[name](exact, "ffn"))


def test_of_a_contrast_logits_are_compared_and_what_needs_a_probability_is_refused(tiny_model):
    case = case_of(tiny_model, against=11)
    for kind in KINDS:
        linear = METHODS["direct_logit"](case, kind, None)
        for name in ("log_prob_increase", "log_prob"):
            scores = METHODS[name](case, kind, None)
            offset = (scores - linear).mean() if name == "log_prob" else 0
            torch.testing.assert_close(scores, linear + offset, rtol=1e-4, atol=1e-5)
        for name in ("prob_increase", "rank", "coefficient_rank"):
            with pytest.raises(InputError, match="contrast has no"):
                METHODS[name](case, kind, None)


# --- cases and the registry -------------------------------------------------------------------


def test_letters_and_names_and_functions_are_methods():
    assert list(LETTERS) == list("abcdefgh")
    assert [LETTERS[letter] for letter in "aeh"] == [
        "log_prob_increase",
        "coefficient",
        "coefficient_rank",
    ]
    assert method_of("a") is METHODS["log_prob_increase"] is method_of("log_prob_increase")
    assert method_name("d") == "norm" == method_name(METHODS["norm"])

    def mine(case, kind, top):
        return METHODS["norm"](case, kind, top)

    assert method_of(mine) is mine and method_name(mine) == "mine"
    for wrong in ("i", "", "Norm", 3, None):
        with pytest.raises(InputError, match="there is no method .*log_prob_increase"):
            method_of(wrong)
    with pytest.raises(TypeError):
        METHODS["mine"] = mine


def test_what_is_no_case_is_refused(tiny_gpt2):
    result = attribute(tiny_gpt2, TOKENS, target=TARGET, top=1)
    host = result.host
    with pytest.raises(InputError, match="is 3 tokens and the prompt 6"):
        Case(result=result, corrupted=tokenize(host, Prompt(tokens=TOKENS[:3])))
    with pytest.raises(InputError, match="is the prompt itself"):
        Case(result=result, corrupted=tokenize(host, Prompt(tokens=TOKENS)))


def test_a_wrong_kind_is_refused(tiny_gpt2):
    with pytest.raises(InputError, match="kind must be 'ffn' or 'attn', got 'both'"):
        neuron_shape(open_host(tiny_gpt2), "both")


@pytest.mark.parametrize("name", ["log_prob_increase", "log_prob", "prob_increase"])
def test_no_neurons_cannot_be_asked_for(tiny_gpt2, name):
    with pytest.raises(InputError, match="top must be at least 1, got 0"):
        METHODS[name](case_of(tiny_gpt2), "ffn", 0)


def test_the_tables_on_the_page_are_what_was_measured():
    root = Path(__file__).parents[1]
    script = runpy.run_path(str(root / "tests" / "benchmarks" / "bench_methods.py"))
    facts = json.loads((root / "docs" / "pages" / "methods.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "pages" / "methods.md").read_text(encoding="utf-8")
    assert script["cost_table"](facts) in page
    assert script["closeness_table"](facts) in page
    assert f"{facts['prompts']} prompts of all six types" in page
    assert all(f"| `{name}` |" in page for name in METHODS)


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 4), st.integers(1, 6)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    ),
    top=st.integers(1, 30),
    seed=st.integers(0, 10**6),
)
def test_the_best_neurons_are_those_of_a_stable_sort(shape, top, seed):
    # few values, so that there are ties
    scores = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()
    scores[scores == -2] = -math.inf
    make = FFNNeuron if len(shape) == 2 else AttnNeuron
    places = [tuple(place) for place in torch.ones(shape).nonzero().tolist()]
    wanted = sorted(
        (place for place in places if scores[place] > -math.inf), key=lambda place: -scores[place]
    )
    assert best_neurons(scores, top) == [make(*place) for place in wanted[:top]]


def test_the_best_neurons_of_the_papers_method_are_those_attributed():
    result = attribute(bridge_of("llama"), TOKENS, target=9, top=15)
    case = Case(result=result)
    method = METHODS["log_prob_increase"]
    assert best_neurons(method(case, "ffn", 15), 15) == result.ffn_neurons.neurons()
    wanted = result.attn_neurons_over_sources.neurons()
    assert best_neurons(method(case, "attn", 15), 15) == wanted


def test_what_has_no_best_neurons_is_refused():
    for scores, message in (
        (torch.zeros(3), "must be numbers of shape"),
        (torch.tensor([[1.0, math.nan]]), "got shape \\[1, 2\\] with NaN"),
    ):
        with pytest.raises(InputError, match=message):
            best_neurons(scores, 1)
    with pytest.raises(InputError, match="top must be at least 1"):
        best_neurons(torch.zeros(2, 2), 0)
