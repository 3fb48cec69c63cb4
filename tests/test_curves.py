"""Mask and keep curves: each point is the run with exactly those neurons zeroed."""

import pandas as pd
import pytest
import torch
from conftest import FAMILIES, TOKENS, bridge_of, count_forward_passes, own_bridge_of

from tl_neuron_attr import (
    AttnNeuron,
    FFNNeuron,
    InputError,
    Zeroed,
    attribute,
    attribute_all,
    compare,
    mask_curve,
    random_neurons,
    top_neurons,
    zeroed_residuals,
)
from tl_neuron_attr.readout import read_out
from tl_neuron_attr.tables import CURVE_COLUMNS

EVERY = 10**6


def log_probs_without(result, zeroed):
    prompt = result.captured.prompt
    resid = zeroed_residuals(result.host, [prompt], [Zeroed(tuple(zeroed))])
    return read_out(result.host, resid[0], "recomputed").logits(resid)[0].log_softmax(-1)


def neurons_of(result, kind, layers):
    host = result.host
    if kind == "ffn":
        return [FFNNeuron(layer, k) for layer in layers for k in range(host.d_mlp)]
    positions = range(result.captured.prompt.read_pos + 1)
    return [
        AttnNeuron(layer, head, k, pos)
        for layer in layers
        for head in range(host.n_heads)
        for pos in positions
        for k in range(host.d_head)
    ]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["ffn", "attn"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "neox-parallel"])
def test_each_point_is_the_run_without_those_neurons(family, kind, keep):
    result = attribute(bridge_of(family), TOKENS, target=9, position=4, top=EVERY)
    layers = (0, 2)
    table = mask_curve(result, kind, (0, 3, 20), keep=keep, layers=layers)
    ranked = [
        neuron for neuron in getattr(result, f"{kind}_neurons").neurons() if neuron.layer in layers
    ]
    assert [*table.columns] == [*CURVE_COLUMNS]
    for row in table.to_dict("records"):
        top = set(ranked[: row["top"]])
        every = neurons_of(result, kind, layers)
        zeroed = [neuron for neuron in every if (neuron not in top) == keep]
        log_probs = log_probs_without(result, zeroed)
        assert row["log_prob"] == pytest.approx(float(log_probs[9]), abs=2e-5)
        assert row["prob"] == pytest.approx(float(log_probs[9].exp()), abs=1e-5)
        assert row["target_rank"] == 1 + int((log_probs > log_probs[9]).sum())
        assert row["correct"] == (row["target_rank"] == 1)
        assert (row["zeroed"], row["kind"], row["keep"]) == (len(zeroed), kind, keep)
    assert table["log_prob"].nunique() == 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ffn", "attn"])
def test_masking_none_and_keeping_all_change_nothing(family, kind):
    result = attribute(bridge_of(family), TOKENS, target=9, top=EVERY)
    wanted = float(result.captured.logits.log_softmax(-1)[9])
    n_neurons = len(getattr(result, f"{kind}_neurons"))
    for keep, top in ((False, 0), (True, n_neurons), (True, EVERY)):
        (row,) = mask_curve(result, kind, [top], keep=keep).to_dict("records")
        assert row["log_prob"] == pytest.approx(wanted, abs=1e-5)
        assert row["zeroed"] == 0
    (row,) = mask_curve(result, kind, [0], keep=True).to_dict("records")
    assert row["zeroed"] == n_neurons and abs(row["log_prob"] - wanted) > 1e-3


def test_keeping_none_of_the_attention_leaves_its_bias(tiny_gpt2):
    """All attention neurons of the read position zeroed: z there is 0, in every layer."""
    result = attribute(tiny_gpt2, TOKENS, target=9, top=EVERY)
    (row,) = mask_curve(result, "attn", [0], keep=True).to_dict("records")

    def nothing(z, hook):
        z = z.clone()
        z[:, -1] = 0
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", nothing) for layer in range(3)]
    with torch.no_grad():
        logits = tiny_gpt2.run_with_hooks(torch.tensor([TOKENS]), fwd_hooks=hooks)
    assert row["log_prob"] == pytest.approx(float(logits[0, -1].log_softmax(-1)[9]), abs=1e-5)


def test_prompts_run_together_as_each_alone(tiny_model, monkeypatch):
    prompts = [TOKENS, TOKENS[:3], (7, 7, 1, 2, 9)]
    results = attribute_all(tiny_model, prompts, target=[9, 4, 5], top=20)
    passes = count_forward_passes(tiny_model, monkeypatch)
    together = mask_curve(results, "ffn", (0, 5, 20))
    assert len(passes) == 1
    assert together["prompt_id"].tolist() == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    for number, result in enumerate(results):
        alone = mask_curve(result, "ffn", (0, 5, 20))
        rows = together.iloc[3 * number : 3 * number + 3]
        assert rows["log_prob"].to_numpy() == pytest.approx(alone["log_prob"].to_numpy(), abs=1e-5)
        assert rows["target_rank"].tolist() == alone["target_rank"].tolist()


def test_rankings_of_other_origins_are_taken(tiny_gpt2):
    first, second = attribute_all(tiny_gpt2, [TOKENS, (3, 17, 9, 41, 8, 30)], target=9, top=30)
    shared = mask_curve([first, second], first.ffn_neurons, [10])
    each = mask_curve([first, second], [first.ffn_neurons, second.ffn_neurons], [10])
    own = mask_curve([first, second], "ffn", [10])
    assert each.equals(own) and shared["log_prob"][0] == own["log_prob"][0]
    assert shared["log_prob"][1] != own["log_prob"][1]
    comparison = compare(first, ["L0.H1"], top=10)
    by_difference = mask_curve(first, comparison.ffn_neurons, [10])
    zeroed = comparison.ffn_neurons.neurons.neurons()
    assert by_difference["log_prob"][0] == pytest.approx(
        float(log_probs_without(first, zeroed)[9]), abs=1e-5
    )
    summed = [block.over_sources() for block in first.attns]
    ranked = top_neurons(summed, first.out, first.target, 6)
    (row,) = mask_curve(first, ranked, [6]).to_dict("records")
    assert row["log_prob"] == pytest.approx(
        float(log_probs_without(first, ranked.neurons())[9]), abs=1e-5
    )


def test_a_contrast_is_followed_as_a_difference(tiny_gpt2):
    result = attribute(tiny_gpt2, TOKENS, target=9, against=4, top=20)
    (row,) = mask_curve(result, "ffn", [20]).to_dict("records")
    log_probs = log_probs_without(result, result.ffn_neurons.neurons())
    assert row["log_prob"] == pytest.approx(float(log_probs[9] - log_probs[4]), abs=1e-5)
    assert row["prob"] == pytest.approx(float(log_probs[9].exp()), abs=1e-6)


def test_contrasts_and_tokens_run_together_as_each_alone(tiny_gpt2):
    results = attribute_all(tiny_gpt2, [TOKENS] * 3, target=[9, 5, 9], against=[None, 4, 4], top=20)
    together = mask_curve(results, "ffn", (0, 20))
    alone = pd.concat([mask_curve(result, "ffn", (0, 20)) for result in results])
    for name in ("log_prob", "prob"):
        assert together[name].to_numpy() == pytest.approx(alone[name].to_numpy(), abs=1e-6)


def test_what_cannot_be_drawn_is_refused(tiny_gpt2, monkeypatch):
    result = attribute(tiny_gpt2, TOKENS, target=9, top=10)
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    for arguments, message in (
        (([],), "no attributions"),
        (([result, attribute(own_bridge_of("gpt2"), TOKENS, top=1)],), "of several models"),
        ((result, "ffn", [11]), "only 10 ffn neurons are ranked in the chosen layers, fewer than"),
        ((result, "ffn", [-1]), "0 or more"),
        ((result, "ffn", []), "numbers of neurons"),
        ((result, "heads"), "'ffn', 'attn' or a ranking"),
        ((result, [FFNNeuron(0, 1)], [1]), "must be a RankedNeurons"),
        ((result, [result.ffn_neurons] * 2, [1]), "there are 2 for 1 prompts"),
    ):
        with pytest.raises(InputError, match=message):
            mask_curve(*arguments)
    for layers in ([3], [-1], []):
        with pytest.raises(InputError, match="some of 0 to 2"):
            mask_curve(result, layers=layers)
    other = attribute(bridge_of("llama"), TOKENS, top=300).attn_neurons
    with pytest.raises(InputError, match="of another model or of a longer prompt"):
        mask_curve(result, other, [1])
    assert passes == []


@pytest.mark.parametrize("kind", ["ffn", "attn"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "neox-parallel"])
def test_random_neurons_have_the_layers_of_the_ranking_place_by_place_and_none_of_its_neurons(
    family, kind
):
    result = attribute(bridge_of(family), TOKENS, target=9, position=4, top=EVERY)
    every = getattr(result, f"{kind}_neurons")
    ranked = every.first(40)
    drawn = random_neurons(result, ranked)
    assert drawn.kind == kind
    assert drawn.layer.tolist() == ranked.layer.tolist()
    names, own = drawn.neurons(), set(ranked.neurons())
    assert len(set(names)) == 40 and own.isdisjoint(names)
    # each is what the model has there, with the score that the whole ranking gives it
    places = [every.neurons().index(name) for name in names]
    assert torch.allclose(drawn.score, every.score[places], atol=1e-5)
    assert torch.allclose(drawn.coefficient, every.coefficient[places])
    assert drawn.number.tolist() == every.number[places].tolist()
    points = mask_curve(result, drawn, (0, 10, 40))
    assert points["zeroed"].tolist() == [0, 10, 40]


def test_random_neurons_depend_on_the_seed_alone():
    result = attribute(bridge_of("gpt2"), TOKENS, target=9, top=30)
    one, again, other = (random_neurons(result, seed=seed).neurons() for seed in (0, 0, 1))
    assert one == again and one != other
    assert set(one).isdisjoint(result.ffn_neurons.neurons())


def test_random_neurons_are_drawn_from_the_whole_layer():
    result = attribute(bridge_of("gpt2"), TOKENS, target=9, top=1)
    (best,) = result.ffn_neurons.neurons()
    drawn = {random_neurons(result, seed=seed).neurons()[0] for seed in range(400)}
    others = {FFNNeuron(best.layer, k) for k in range(result.host.d_mlp)} - {best}
    assert len(drawn) > 0.9 * len(others) and drawn <= others


def test_what_nothing_can_be_drawn_beside_is_refused():
    result = attribute(bridge_of("gpt2"), TOKENS, target=9, top=EVERY)
    shorter = attribute(bridge_of("gpt2"), TOKENS[:2], target=9, top=EVERY)
    for ranked, message in (
        ("ffn", r"there are not as many others; give fewer, as result.ffn_neurons.first\(N\)"),
        ("attn", "there are not as many others"),
        (result.ffn_neurons.first(0), "the ranking is empty"),
        (result.attn_neurons_over_sources.first(3), "is summed over source positions"),
    ):
        with pytest.raises(InputError, match=message):
            random_neurons(result, ranked)
    with pytest.raises(InputError, match="is of another model or prompt"):
        random_neurons(shorter, result.attn_neurons)
    with pytest.raises(InputError, match="seed must be at least 0"):
        random_neurons(result, seed=-1)


def test_a_table_of_neurons_is_a_ranking_in_its_order():
    result = attribute(bridge_of("llama"), TOKENS, target=9, top=30)
    for kind in ("ffn", "attn"):
        table = result.neurons(kind)
        wanted = mask_curve(result, kind, (0, 3, 30))
        assert mask_curve(result, table, (0, 3, 30)).equals(wanted)
        backwards = mask_curve(result, table[::-1], (0, 3, 30))["log_prob"].tolist()
        forwards = wanted["log_prob"].tolist()
        assert backwards[::2] == pytest.approx(forwards[::2], abs=1e-5)
        assert abs(backwards[1] - forwards[1]) > 1e-4
    queries = result.query_neurons(20, of="both")
    beside = random_neurons(result, queries)
    assert beside.layer.tolist() == queries["layer"].tolist()
    for wrong, message in (
        (result.neurons(), "this one holds both"),
        (result.neurons().head(0), "this one holds none"),
        (result.layers(), "this one lacks head, index"),
    ):
        with pytest.raises(InputError, match=message):
            mask_curve(result, wrong, (0, 3))
