"""Which neurons are zeroed: the best, ties in order; controls of the same layers, and disjoint."""

import math

import pytest
import torch
from conftest import FAMILIES, TOKENS, bridge_of
from hypothesis import given
from hypothesis import strategies as st

from tl_neuron_attr import InputError, attribute
from tl_neuron_attr.evaluate.rankings import (
    best,
    check_scores,
    contribution_norms,
    norm_matched,
    random_beside,
    random_keys,
)

LAYERS, WIDTH = 4, 12


def layers_of(numbers):
    return torch.bincount(torch.as_tensor(numbers) // WIDTH, minlength=LAYERS).tolist()


@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 0.5, 2.0]), min_size=6, max_size=24))
def test_the_best_are_those_of_sorting_all_ties_by_layer_then_place(scores):
    scores = torch.tensor(scores[: len(scores) // 2 * 2]).view(2, -1)
    ranked = sorted(range(scores.numel()), key=lambda place: -scores.flatten()[place])
    ranked = [place for place in ranked if scores.flatten()[place] > -math.inf]
    for top in (1, 3, scores.numel(), 100):
        assert best(scores, top).tolist() == ranked[:top]


def test_the_best_attention_neurons_are_counted_through_layers_and_heads():
    scores = torch.zeros(2, 3, 4)
    scores[1, 2, 3], scores[0, 1, 0] = 2, 1
    assert best(scores, 2).tolist() == [23, 4]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "must give a tensor of floats of shape \\[2, 3\\], got list"),
        (torch.zeros(2, 3, dtype=torch.long), "got torch.int64"),
        (torch.zeros(6), "shape \\[2, 3\\], got \\[6\\]"),
        (torch.tensor([[0, 1, math.nan], [0, 1, 2]]), "NaN"),
        (torch.tensor([[0, 1, math.inf], [0, 1, 2]]), "inf"),
    ],
)
def test_what_is_no_score_is_refused_by_the_methods_name(scores, message):
    with pytest.raises(InputError, match=f"method 'mine'.*{message}"):
        check_scores(scores, (2, 3), "mine")


chosen_neurons = st.sets(st.integers(0, LAYERS * WIDTH - 1), max_size=30).map(
    lambda chosen: torch.tensor(sorted(chosen), dtype=torch.long)
)


@given(chosen_neurons, st.integers(0, 5))
def test_controls_are_as_many_others_of_the_same_layers(chosen, seed):
    keys = random_keys((LAYERS, WIDTH), seed, "prompt")
    norms = random_keys((LAYERS, WIDTH), seed, "norms").mul(5).round()  # with ties
    wanted = [min(count, WIDTH - count) for count in layers_of(chosen)]
    for drawn in (random_beside(chosen, keys), norm_matched(chosen, norms)):
        assert layers_of(drawn) == wanted
        assert not set(drawn.tolist()) & set(chosen.tolist())
        assert len(set(drawn.tolist())) == len(drawn)


def test_a_random_control_is_every_other_neuron_equally_often():
    chosen = torch.tensor([0, 1, WIDTH + 5])
    counts = torch.zeros(LAYERS * WIDTH)
    for seed in range(2000):
        counts[random_beside(chosen, random_keys((LAYERS, WIDTH), seed, "p"))] += 1
    counts = counts.view(LAYERS, WIDTH) / 2000
    assert counts[0, 2:].tolist() == pytest.approx([0.2] * 10, abs=0.04)
    assert counts[1].sum() == pytest.approx(1) and counts[1].max() < 0.13
    assert counts[2:].sum() == counts[0, :2].sum() == counts[1, 5] == 0


def test_random_numbers_depend_on_seed_and_prompt_alone():
    keys = random_keys((2, 3), 0, "capital/France/0", "ffn")
    state = torch.get_rng_state()
    assert torch.equal(keys, random_keys((2, 3), 0, "capital/France/0", "ffn"))
    for other in ((1, "capital/France/0", "ffn"), (0, "capital/France/1", "ffn")):
        assert not torch.equal(keys, random_keys((2, 3), *other))
    assert torch.equal(state, torch.get_rng_state())


def test_norm_matched_neurons_are_the_nearest_that_are_left():
    norms = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 3.1, 9.0, 9.1, 0.0, 8.9, 2.6]])
    assert norm_matched(torch.tensor([2]), norms).tolist() == [6]  # 3.0 -> 3.1
    assert norm_matched(torch.tensor([2, 6]), norms).tolist() == [3, 11]  # 3, 3.1 -> 2.6, 4
    assert norm_matched(torch.tensor([7, 8]), norms).tolist() == [5, 10]  # the largest two left
    assert norm_matched(torch.tensor([9]), norms).tolist() == [0]
    assert norm_matched(torch.tensor([], dtype=torch.long), norms).tolist() == []


def test_matching_in_norm_comes_close_to_the_best_assignment():
    from scipy.optimize import linear_sum_assignment

    for seed in range(20):
        norms = random_keys((1, 200), seed, "norms").square()
        chosen = norms[0].topk(60).indices[::3]  # large ones, with others between them
        found = norm_matched(chosen, norms)
        others = torch.tensor(sorted(set(range(200)) - set(chosen.tolist())))
        apart = (norms[0, chosen][:, None] - norms[0, others]).abs().numpy()
        least = apart[linear_sum_assignment(apart)].sum()
        wanted, got = norms[0, chosen].sort().values, norms[0, found].sort().values
        assert float((wanted - got).abs().sum()) <= 1.5 * least


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_of_what_each_neuron_adds(family):
    result = attribute(bridge_of(family), TOKENS, target=9, top=1)
    for kind in ("ffn", "attn"):
        norms = contribution_norms(result, kind)
        blocks = result.ffns if kind == "ffn" else [each.over_sources() for each in result.attns]
        for layer, block in enumerate(blocks):
            vectors = block.vectors(torch.arange(block.n_neurons))
            assert norms[layer].tolist() == pytest.approx(vectors.norm(dim=1).tolist(), abs=1e-5)
