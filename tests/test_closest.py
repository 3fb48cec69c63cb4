"""Scores that come close to zeroing: against the frozen model spelt out, and against zeroing."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from conftest import TOKENS, bridge_of, bundled_model, hooked_of, needs_hooked_transformer
from hypothesis import given
from hypothesis import strategies as st

from tl_neuron_attr import InputError, attribute
from tl_neuron_attr.methods import METHODS, Case
from tl_neuron_attr.methods.carried import carried_back, carried_once
from tl_neuron_attr.methods.curved import answer_and_rivals, bent, curved_gradient
from tl_neuron_attr.readout import read_out

KINDS = ("ffn", "attn")
DOCS = Path(__file__).parents[1] / "docs"
TARGET = 9


def assert_same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def case_of(model, tokens=TOKENS, **options):
    return Case(result=attribute(model, tokens, **{"target": TARGET, "top": 5, **options}))


# --- the frozen model, spelt out ----------------------------------------------------------------


class Frozen:
    """The network as carried scores see it: patterns and chords constants, norms as they are.

    In float64, from the weights, with every coefficient multiplied by a dial; autograd does what
    the package does by hand.
    """

    def __init__(self, model, case):
        self.host, self.case = case.result.host, case.result
        self.tokens = case.result.captured.prompt.tokens
        self.read_pos = case.result.captured.prompt.read_pos
        _, cache = model.run_with_cache(torch.tensor([self.tokens]))
        upto = slice(0, self.read_pos + 1)
        self.pattern = [
            cache[f"blocks.{layer}.attn.hook_pattern"][0, :, upto, upto].double()
            for layer in range(self.host.n_layers)
        ]
        self.post = [
            cache[f"blocks.{layer}.mlp.hook_post"][0, upto].double()
            for layer in range(self.host.n_layers)
        ]
        self.embedded = cache["blocks.0.hook_resid_pre"][0, upto].double()

    def norm(self, norm, x):
        if norm.kind == "none":
            return x
        x = x - x.mean(-1, keepdim=True) if self.host.norm == "layer_norm" else x
        x = x / (x.pow(2).mean(-1, keepdim=True) + self.host.eps).sqrt()
        x = x if norm.gain is None else x * norm.gain.double()
        return x if norm.bias is None else x + norm.bias.double()

    def attn(self, layer, x, dial):
        host = self.host
        read = self.norm(host.attn_norm(layer), x)
        z = []
        for head in range(host.n_heads):
            group = head // (host.n_heads // host.W_V(layer).shape[0])
            v = read @ host.W_V(layer)[group].double()
            if host.b_V(layer) is not None:
                v = v + host.b_V(layer)[group].double()
            z.append(self.pattern[layer][head] @ v)
        z = torch.stack(z, 1) * dial
        out = torch.einsum("phd,hdm->pm", z, host.W_O(layer).double())
        out = out if host.b_O(layer) is None else out + host.b_O(layer).double()
        return self.written("attn", layer, out)

    def written(self, kind, layer, out):
        """In the residual stream: through the sub-layer's own norm, its scale answering."""
        post = self.host.post_norm(layer, kind)
        return self.host.residual_scale * (out if post is None else self.norm(post, out))

    def ffn(self, layer, x, dial):
        host, post = self.host, self.post[layer]
        read = self.norm(host.ffn_norm(layer), x)

        def pre(weight, bias):
            product = read @ weight.double()
            return product if bias is None else product + bias.double()

        up = pre(host.W_in(layer), host.b_in(layer))
        if host.W_gate(layer) is None:
            hidden = up * (post / up).detach()
        else:
            gate = pre(host.W_gate(layer), host.b_gate(layer))
            hidden = gate * (post / (gate * up)).detach() * up
        out = (hidden * dial) @ host.W_out(layer).double()
        out = out if host.b_out(layer) is None else out + host.b_out(layer).double()
        return self.written("ffn", layer, out)

    def final(self, dials):
        x = self.embedded
        for layer in range(self.host.n_layers):
            attn = self.attn(layer, x, dials["attn"][layer])
            ffn = self.ffn(layer, x if self.host.parallel else x + attn, dials["ffn"][layer])
            x = x + attn + ffn
        return x[self.read_pos]

    def log_prob(self, resid):
        out = read_out(self.host, resid, "recomputed", dtype=torch.float64)
        return out.log_prob(resid, self.case.target)

    def final_once(self, dials):
        """The same, but what a sub-layer does in answer to another moves nothing but the end."""
        x, wrote, moved = self.embedded, 0, 0
        for layer in range(self.host.n_layers):
            attn = self.attn(layer, x, dials["attn"][layer])
            answer = self.attn(layer, x + wrote, 1.0)
            mid, written = x + attn.detach(), wrote + attn - attn.detach()
            before, others = (x, wrote) if self.host.parallel else (mid, written)
            ffn = self.ffn(layer, before, dials["ffn"][layer])
            answer = answer + self.ffn(layer, before + others, 1.0)
            moved = moved + answer - answer.detach()
            wrote = written + ffn - ffn.detach()
            x = mid + ffn.detach()
        return (x + wrote + moved)[self.read_pos]

    def first_order(self, final):
        """What turning each dial from 1 to 0 takes from log p, at first order."""
        dials = {
            "ffn": torch.ones(self.host.n_layers, self.host.d_mlp),
            "attn": torch.ones(self.host.n_layers, self.host.n_heads, self.host.d_head),
        }
        dials = {kind: dial.double().requires_grad_() for kind, dial in dials.items()}
        gradients = torch.autograd.grad(self.log_prob(final(dials)), [*dials.values()])
        return dict(zip(dials, gradients, strict=True))


def test_carried_scores_are_gradients_of_the_frozen_model(any_model):
    check_carried(any_model)


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_they_are_so_through_norms_on_what_sub_layers_write_and_under_a_soft_cap(family):
    check_carried(bridge_of(family))


def check_carried(model):
    case = case_of(model)
    frozen = Frozen(model, case)
    rivals = answer_and_rivals(case)
    undialled = {"ffn": torch.ones(3), "attn": torch.ones(3)}
    final = case.result.captured.resid_final
    for method, run in ((carried_back, frozen.final), (carried_once, frozen.final_once)):
        torch.testing.assert_close(run(undialled).float(), final, rtol=1e-4, atol=1e-4)
        wanted = frozen.first_order(run)
        for kind in KINDS:
            assert method(case, kind).dtype == torch.float32
            assert_same(method(case, kind).double(), bent(case, kind, wanted[kind], rivals))


def test_nothing_comes_from_after_the_read_position_also_of_a_contrast():
    model = bridge_of("llama")
    whole = case_of(model, position=3, against=30)
    cut = case_of(model, TOKENS[:4], against=30)
    for name in ("carried_once", "carried_back", "curved_gradient"):
        for kind in KINDS:
            assert_same(METHODS[name](whole, kind, None), METHODS[name](cut, kind, None))


# --- bending ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel", "gemma"])
@pytest.mark.parametrize("against", [None, 30])
def test_what_nothing_comes_after_is_exact_with_every_token_a_rival(family, against):
    case = case_of(bridge_of(family), against=against)
    kinds = KINDS if case.result.host.parallel else KINDS[:1]
    for kind in kinds:
        exact = METHODS["ablation"](case, kind, None)[-1]
        found = curved_gradient(case, kind, rivals=case.result.host.d_vocab)[-1]
        straight = METHODS["gradient_activation"](case, kind, None)[-1]
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=3e-6)
        assert (straight - exact).abs().max() > 20 * (found - exact).abs().max()


def test_the_rivals_gradient_is_that_of_the_model(tiny_model):
    for options in ({}, {"against": 30}):
        case = case_of(tiny_model, **options)
        resid = case.result.captured.resid_final.double().requires_grad_()
        out = read_out(case.result.host, resid.detach(), "recomputed")
        (wanted,) = torch.autograd.grad(out.log_prob(resid, case.result.target), resid)
        for count in (1, 5, 60, 1000):
            rivals = out.rivals(resid.detach(), case.result.target, count)
            torch.testing.assert_close(rivals.gradient, wanted)
            assert float(rivals.prob.sum()) == pytest.approx(1)


@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=9),
    st.integers(1, 40),
    st.floats(-1e-3, 1e-3),
)
def test_what_comes_by_way_of_others_keeps_its_order_and_is_straight_where_small(
    losses, count, small
):
    case = SOME_CASE
    rivals = answer_and_rivals(case, count)
    losses = torch.tensor(sorted(losses), dtype=torch.float64)
    nothing = torch.zeros(len(losses), case.result.host.d_model)
    ones = torch.ones(nothing.shape[1])
    bends = rivals.loss(nothing, torch.ones(len(losses)), losses, ones)
    assert (bends.diff() >= 0).all() and bends.isfinite().all()
    # log p is concave in a logit: the loss is never below the straight line, or log p above 0
    assert (bends >= losses - 1e-9).all() and (bends >= case.result.log_prob - 1e-6).all()
    one = torch.tensor([small], dtype=torch.float64)
    bend = float(rivals.loss(nothing[:1], torch.ones(1), one, ones))
    assert bend == pytest.approx(small, rel=2e-3, abs=1e-12)


def test_a_neuron_that_is_silent_loses_nothing_whatever_its_row():
    rivals = answer_and_rivals(SOME_CASE)
    rows = SOME_CASE.result.host.W_out(0)
    zeros = torch.zeros(len(rows))
    assert rivals.loss(rows, zeros, zeros, torch.ones(rows.shape[1])).abs().max() < 1e-12


def test_an_answer_that_is_certain_is_scored_without_nan(tiny_gpt2):
    case = case_of(tiny_gpt2)
    rivals = answer_and_rivals(case)
    sure = type(rivals)(**{**vars(rivals), "prob": rivals.prob.new_tensor([1.0] + [0.0] * 9)})
    rows = case.result.host.W_out(0)
    no_loss, ones = torch.zeros(len(rows)), torch.ones(rows.shape[1])
    lost = sure.loss(rows, torch.ones(len(rows)), no_loss, ones)
    assert not lost.isnan().any()


def test_at_least_one_rival_is_asked_for(tiny_gpt2):
    with pytest.raises(InputError, match="rivals"):
        curved_gradient(case_of(tiny_gpt2), "ffn", rivals=0)


# --- against zeroing ----------------------------------------------------------------------------


def agreement(scores, exact):
    """Rank correlation over the neurons that do anything."""
    live = exact != 0
    ranks = torch.stack([each[live].argsort().argsort().double() for each in (scores, exact)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.slow
def test_on_the_bundled_model_they_come_closer_to_zeroing_in_this_order():
    model = bundled_model(dtype=torch.float64)
    case = Case(result=attribute(model, "The capital of France is", target=" Paris", top=5))
    order = ("log_prob_increase", "carried_once", "carried_back", "curved_gradient")
    for kind in KINDS:
        exact = METHODS["ablation"](case, kind, None)
        found = {
            name: agreement(METHODS[name](case, kind, None), exact)
            for name in (*order, "gradient_activation")
        }
        assert [found[name] for name in order] == sorted(found[name] for name in order), found
        assert found["carried_once"] > found["log_prob_increase"] + 0.2, found
        assert found["curved_gradient"] > found["gradient_activation"], found


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_both_classes_get_the_same_scores(family):
    cases = [case_of(build(family)) for build in (bridge_of, hooked_of)]
    for name in ("carried_once", "carried_back", "curved_gradient"):
        for kind in KINDS:
            first, second = (METHODS[name](case, kind, None) for case in cases)
            assert_same(first, second)


def test_the_tables_on_the_page_are_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)  # the script has a module beside it
    script = runpy.run_path(str(DOCS / "closest.py"))
    facts = json.loads((DOCS / "pages" / "closest.json").read_text(encoding="utf-8"))
    page = (DOCS / "pages" / "closest.md").read_text(encoding="utf-8")
    for each in script["tables"](facts).values():
        assert each in page
    assert set(script["DIRECTORIES"]) < set(facts) and facts["tiny-facts"]["prompts"] == 60


@pytest.mark.parametrize("kind", KINDS)
def test_of_what_ships_the_named_ones_came_closest_on_every_model(kind):
    """What the page claims, of the figures it shows."""
    facts = json.loads((DOCS / "pages" / "closest.json").read_text(encoding="utf-8"))
    for model in ("tiny-facts", "slm4096", "babyllama105", "stories260K"):
        rows = facts[model][kind]
        rank = {name: row["rank_correlation"] for name, row in rows.items()}
        for other in ("log_prob_increase", "direct_logit", "query", "value_and_query"):
            assert rank["carried_once"] > rank[other], (model, other)
        assert rank["carried_back"] > rank["carried_once"], model
        for other in rows.keys() - {"ablation", "curved_gradient"}:
            assert rank["curved_gradient"] >= rank[other], (model, other)


SOME_CASE = case_of(bridge_of("llama"))
