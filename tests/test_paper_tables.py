"""What the paper's tables are made of, against slow computations by definition."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import bridge_of

from tl_neuron_attr import attribute_all, projection_index
from tl_neuron_attr.across import layers_by_type
from tl_neuron_attr.host import open_host
from tl_neuron_attr.methods import METHODS, Case
from tl_neuron_attr.neurons import Head
from tl_neuron_attr.paper import figures, tables
from tl_neuron_attr.paper.collect import collect, collect_shares, queries_of
from tl_neuron_attr.paper.settings import in_proportion, sizes
from tl_neuron_attr.paper.zeroing import PAPER_METHODS, zero_heads, zero_neurons
from tl_neuron_attr.prompts import Prompt
from tl_neuron_attr.targets import tokenize
from tl_neuron_attr.views import type_layer_heatmap

PROMPTS = {
    "one": ((3, 17, 5, 40, 8, 22), 9),
    "two": ((3, 17, 5, 41, 8), 4),
    "three": ((7, 7, 1, 2, 9, 30, 31), 9),
}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    return bridge_of(request.param)


@pytest.fixture(scope="module")
def results(model):
    asked = [
        Prompt(tokens=tokens, target=target, prompt_id=name)
        for name, (tokens, target) in PROMPTS.items()
    ]
    return attribute_all(model, asked, top=300)


@pytest.fixture(scope="module")
def queries(results):
    return queries_of(results)


@pytest.fixture(scope="module")
def zeroed(results, queries):
    cases = [Case(result=result) for result in results]
    return zero_neurons(cases, [each for _, each in queries], "capital", seed=0)


@pytest.fixture(scope="module")
def collected(results, queries):
    return collect(results, queries, "capital")


def test_layers_are_those_of_each_attribution(results, collected):
    wanted = pd.concat([each.layers() for each in results], ignore_index=True)
    found = collected["layers"]
    assert found["prompt_id"].tolist() == [name for name in PROMPTS for _ in range(6)]
    assert set(found["knowledge_type"]) == {"capital"}
    for column in ("layer", "kind"):
        assert found[column].tolist() == wanted[column].tolist()
    assert found["score"].to_numpy() == pytest.approx(wanted["score"].to_numpy(), abs=1e-7)


def test_query_layers_are_those_of_each_attribution(results, collected):
    found = collected["query_layers"]
    for of in ("ffn", "attn"):
        wanted = pd.concat([each.query_layers(of) for each in results], ignore_index=True)
        here = found[found["of"] == of]
        assert here["kind"].tolist() == wanted["kind"].tolist()
        assert here["layer"].tolist() == wanted["layer"].tolist()
        assert here["score"].to_numpy() == pytest.approx(wanted["score"].to_numpy(), abs=1e-6)


def test_heads_are_summed_over_prompts(results, collected):
    wanted = sum(each.heads()["score"].to_numpy() for each in results)
    assert collected["heads"]["score_sum"].to_numpy() == pytest.approx(wanted, abs=1e-5)
    assert set(collected["heads"]["prompts"]) == {3}


def labels_of(table):
    rows = table[["layer", "head", "index"]].astype("Int64").itertuples(index=False)
    return [tuple(None if cell is pd.NA else int(cell) for cell in row) for row in rows]


def test_neurons_are_counted_over_prompts(results, queries, collected):
    host = results[0].host
    top = sizes(host).top
    for role, kind in (("value", "ffn"), ("value", "attn"), ("query", "ffn")):
        for size in {top[kind], 300}:
            counts = {}
            for result, (_, of_attn) in zip(results, queries, strict=True):
                if role == "value":
                    table = result.neurons(kind, by_source=False)
                else:
                    table = result.query_neurons(300, of=of_attn)
                table = table[table["score"] > 0]
                for label in labels_of(table.head(size)):
                    counts[label] = counts.get(label, 0) + 1
            found = collected["neurons"]
            here = found[(found["role"] == role) & (found["kind"] == kind) & (found["top"] == size)]
            found_counts = dict(zip(labels_of(here), here["prompts"], strict=True))
            assert found_counts == counts, (role, kind, size)


def test_query_neurons_are_split_into_those_that_are_value_neurons_and_others(
    results, queries, collected
):
    split = collected["query_split"]
    size = sizes(results[0].host).top["ffn"]
    for name, result, (_, of_attn) in zip(PROMPTS, results, queries, strict=True):
        query = result.query_neurons(300, of=of_attn)
        query = query[query["score"] > 0].head(size)
        value = result.neurons("ffn", size)
        value = {
            tuple(each) for each in value.loc[value["score"] > 0, ["layer", "index"]].to_numpy()
        }
        both = [tuple(each) in value for each in query[["layer", "index"]].to_numpy()]
        here = split[(split["prompt_id"] == name) & (split["top"] == size)]
        for layer in range(3):
            own = (query["layer"] == layer).to_numpy()
            row = here[here["layer"] == layer].iloc[0]
            assert row["query_and_value"] == (own & both).sum()
            assert row["query_only"] == (own & ~np.array(both)).sum()


def test_the_segment_is_read_out_with_the_final_norm_frozen(results, collected):
    segment = collected["segment"]
    for result in results:
        out = result.out
        here = segment[segment["prompt_id"] == result.captured.prompt.prompt_id]
        start, end = result.captured.resid_pre[0].double(), result.captured.resid_final.double()
        for part, found in zip(here["part"], here["log_prob"], strict=True):
            x = start + part * (end - start)
            x = (x - x.mean()) if out.centered else x
            x = x / out.norm_scale.double() * out.gain.double()
            x = x if out.bias is None else x + out.bias.double()
            logits = x @ out.W_U.double()
            logits = logits if out.b_U is None else logits + out.b_U.double()
            assert found == pytest.approx(float(logits.log_softmax(-1)[result.target.id]), abs=1e-5)
        assert here["log_prob"].iloc[0] == pytest.approx(result.embedding_log_prob, abs=1e-5)
        assert here["log_prob"].iloc[-1] == pytest.approx(result.log_prob, abs=1e-5)


def test_shares_hold_the_true_share_between_their_ends(model, results, tmp_path):
    index = projection_index(model, tmp_path)
    found = collect_shares(results[:1], index, "capital")
    scores = METHODS["log_prob_increase"](Case(result=results[0]), "ffn", None).flatten().double()
    best = scores.clamp(min=0).sort(descending=True).values
    for row in found[found["kind"] == "ffn"].itertuples():
        share = float(best[: row.top].sum() / best.sum())
        assert row.share_lower - 1e-6 <= share <= row.share_upper + 1e-6
    assert found["share_upper"].iloc[-1] == pytest.approx(1.0)


def without(model, tokens, target, ffn=(), heads=(), attn=()):
    """log p and rank of the target by definition: hooks on coefficients and z."""
    hooks = []
    for layer, index in ffn:

        def zero(activation, hook, index=index):
            activation[..., index] = 0
            return activation

        hooks.append((f"blocks.{layer}.mlp.hook_post", zero))
    for layer, *place in (*heads, *attn):

        def zero_z(activation, hook, place=place):
            activation[(slice(None), slice(None), *place)] = 0
            return activation

        hooks.append((f"blocks.{layer}.attn.hook_z", zero_z))
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=hooks)[0, -1]
    return float(logits.log_softmax(-1)[target]), int((logits > logits[target]).sum()) + 1


def best_by(scores, top):
    """Places of the largest, ties in order: with a sort, not a search."""
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda place: -flat[place])[:top]
    return [np.unravel_index(place, scores.shape) for place in order]


def test_effects_are_those_of_runs_with_just_those_neurons_zeroed(model, results, zeroed):
    cases = [Case(result=result) for result in results]
    effects, chosen = zeroed
    host = results[0].host
    for case, (name, (tokens, target)) in zip(cases, PROMPTS.items(), strict=True):
        rows = effects[effects["prompt_id"] == name]
        before = without(model, tokens, target)
        assert rows["log_prob_before"].to_numpy() == pytest.approx(before[0], abs=1e-4)
        assert set(rows["rank_before"]) == {before[1]}
        for method in PAPER_METHODS:
            neurons = best_by(METHODS[method](case, "ffn", None), 10)
            log_prob, rank = without(model, tokens, target, ffn=neurons)
            row = rows[rows["method"] == method].iloc[0]
            assert row["log_prob"] == pytest.approx(log_prob, abs=1e-4), method
            assert row["rank"] == rank, method
        score = METHODS["log_prob_increase"]
        size = sizes(host)
        ffn = best_by(score(case, "ffn", None), size.value_ffn)
        attn = best_by(score(case, "attn", None), size.value_attn)
        log_prob, _ = without(model, tokens, target, ffn=ffn, attn=attn)
        row = rows[(rows["method"] == "value_neurons") & (rows["scale"] == "in proportion")].iloc[0]
        assert row["log_prob"] == pytest.approx(log_prob, abs=1e-4)
        assert (row["ffn"], row["attn"]) == (size.value_ffn, size.value_attn)
    counted = chosen.groupby("method")["neurons"].sum()
    assert counted.to_dict() == dict.fromkeys(PAPER_METHODS, 30)


def test_shallow_query_neurons_are_of_the_first_half_of_the_layers(model, results, queries, zeroed):
    (_, of_attn), (effects, _) = queries[0], zeroed
    row = effects[effects["method"] == "shallow_query_neurons"].iloc[0]
    scores = of_attn.ffn_neurons[:1]
    count = sizes(results[0].host).shallow_query
    tokens, target = PROMPTS["one"]
    log_prob, _ = without(model, tokens, target, ffn=best_by(scores, count))
    assert row["ffn"] == count
    assert row["log_prob"] == pytest.approx(log_prob, abs=1e-4)


def test_random_neurons_depend_on_the_seed_and_the_prompt_alone(results, queries, zeroed):
    def alone(seed):
        return zero_neurons([Case(result=results[2])], [queries[2][1]], "capital", seed)[0]

    def random(effects):
        here = effects[(effects["method"] == "random") & (effects["prompt_id"] == "three")]
        return here["log_prob"].to_numpy()

    assert random(alone(0)) == pytest.approx(random(zeroed[0]), abs=1e-5)
    assert not np.allclose(random(alone(1)), random(zeroed[0]), atol=1e-4)


def test_heads_are_zeroed_in_every_prompt(model):
    host = open_host(model)
    prompts = [
        tokenize(host, Prompt(tokens=tokens, target=target, prompt_id=name))
        for name, (tokens, target) in PROMPTS.items()
    ]
    sets = {"capital": (Head(1, 2), Head(0, 0)), "random": (Head(2, 1),)}
    found = zero_heads(host, prompts, sets, "capital")
    for row in found.itertuples():
        tokens, target = PROMPTS[row.prompt_id]
        heads = [(head.layer, head.head) for head in sets[row.heads_of]]
        log_prob, rank = without(model, tokens, target, heads=heads)
        assert (row.log_prob, row.rank) == (pytest.approx(log_prob, abs=1e-4), rank)
        assert row.log_prob_before == pytest.approx(without(model, tokens, target)[0], abs=1e-4)


# --- from rows to tables ----------------------------------------------------------------------


@pytest.fixture
def effects(zeroed):
    found = zeroed[0].copy()
    found.loc[found["prompt_id"] == "three", "knowledge_type"] = "month"
    return found


FACTS = {"one": ("a", "r", "s"), "two": ("a", "r", "s"), "three": ("b", "r", "s")}


def test_the_table_of_methods_holds_means_over_prompts_beside_published_values(effects):
    table = tables.methods_table(effects, FACTS, seed=0)
    assert table["method"].tolist()[:11] == ["original", *PAPER_METHODS, "random", "norm_matched"]
    for row in table.itertuples():
        rows = effects[effects["test"] == "methods"]
        if row.knowledge_type != "all":
            rows = rows[rows["knowledge_type"] == row.knowledge_type]
        rows = rows[rows["method"] == ("norm" if row.method == "original" else row.method)]
        ending = "_before" if row.method == "original" else ""
        ranks, log_probs = rows[f"rank{ending}"], rows[f"log_prob{ending}"]
        assert row.prompts == len(rows)
        assert row.mrr == pytest.approx(sum(1 / rank for rank in ranks) / len(rows))
        assert row.prob == pytest.approx(100 * sum(map(math.exp, log_probs)) / len(rows))
        assert row.log_prob == pytest.approx(sum(log_probs) / len(rows))
        assert row.prob_low <= row.prob + 1e-9 and row.prob <= row.prob_high + 1e-9
    a = table[(table["letter"] == "a") & (table["knowledge_type"] == "all")].iloc[0]
    assert (a["gpt2_large_mrr"], a["gpt2_large_prob"]) == (0.201, 3.4)
    assert (a["llama_7b_mrr"], a["llama_7b_prob"]) == (0.312, 9.2)
    assert table.loc[table["knowledge_type"] != "all", "gpt2_large_mrr"].isna().all()
    assert table.loc[table["knowledge_type"] == "all", "facts"].tolist() == [2] * 11
    figure = figures.method_bars(table, "left")
    bars = figure.data[0]
    assert bars.y[0] == 100 and bars.error_y.array[0] is None and bars.error_y.arrayminus[0] is None
    everything = table[table["knowledge_type"] == "all"]
    assert bars.y[1] + bars.error_y.array[1] == pytest.approx(everything["prob_left_high"].iloc[1])
    assert bars.y[1] - bars.error_y.arrayminus[1] == pytest.approx(
        everything["prob_left_low"].iloc[1]
    )


def made_up_effects(facts=9):
    """Two prompts a fact that differ little; after zeroing a half is left of each, or nearly."""
    rng = np.random.default_rng(7)
    rows, about = [], {}
    for fact in range(facts):
        before = rng.uniform(0.01, 0.9)
        for wording in range(2):
            name = f"{fact}/{wording}"
            about[name] = ("capital", "capital", str(fact))
            start = before * (1 + 0.01 * wording)
            for method in (*PAPER_METHODS, "random", "norm_matched"):
                left = start * (0.5 if method == "norm" else rng.uniform(0.3, 0.7))
                rows.append(
                    ("capital", name, "methods", method, math.log(start), 1, math.log(left), 2)
                )
    names = "knowledge_type prompt_id test method log_prob_before rank_before log_prob rank"
    return pd.DataFrame(rows, columns=names.split()), about


def test_intervals_are_of_facts_drawn_with_all_their_prompts_and_ratios_are_paired():
    effects, facts = made_up_effects()
    table = tables.methods_table(effects, facts, seed=3).set_index(["knowledge_type", "method"])
    names = [*dict.fromkeys(facts.values())]
    for method in ("log_prob_increase", "norm"):
        rows = effects[effects["method"] == method]
        prompts = {
            fact: [
                (math.exp(row.log_prob_before), math.exp(row.log_prob))
                for row in rows.itertuples()
                if facts[row.prompt_id] == fact
            ]
            for fact in names
        }
        rng = np.random.default_rng(3)
        ratios = []
        for _ in range(2000):
            drawn = [prompts[names[n]] for n in rng.integers(0, len(names), len(names))]
            pairs = [pair for of_fact in drawn for pair in of_fact]
            ratios.append(sum(after for _, after in pairs) / sum(before for before, _ in pairs))
        found = table.loc[("all", method)]
        wanted = [100 * np.quantile(ratios, end) for end in (0.025, 0.975)]
        assert [found["prob_left_low"], found["prob_left_high"]] == pytest.approx(wanted)
    # a half of every prompt is a half of every draw, however far apart the prompts are
    half = table.loc[("all", "norm")]
    assert [half["prob_left_low"], half["prob_left_high"]] == pytest.approx([50, 50])
    assert half["prob_high"] - half["prob_low"] > 5
    original = table.loc[("all", "original")]
    assert [original["prob_left_low"], original["prob_left_high"]] == pytest.approx([100, 100])
    # as if each prompt were a fact of its own: narrower by about the root of 2
    alone = tables.methods_table(effects, {name: (name,) for name in facts}, seed=3)
    alone = alone.set_index(["knowledge_type", "method"])
    for measure in ("prob", "log_prob"):
        width = table[f"{measure}_high"] - table[f"{measure}_low"]
        narrower = alone[f"{measure}_high"] - alone[f"{measure}_low"]
        assert (width / narrower).loc[("all", "original")] == pytest.approx(2**0.5, rel=0.1)


def test_a_prompt_without_a_control_is_left_out_of_both_means_there():
    values = np.array([[10.0, 5.0, np.nan], [20.0, 4.0, 5.0], [30.0, 3.0, np.nan]])
    found = tables.ratio_of_means(values, np.arange(3), seed=0)
    assert found.mean == pytest.approx([1, 12 / 60, 5 / 20])
    assert (found.low[2], found.high[2]) == (0.25, 0.25)
    assert found.low[1] < 0.2 < found.high[1]


def test_drops_are_per_cent_of_the_means(effects):
    table = tables.drops_table(effects)
    assert table["scale"].tolist() == ["as published", "in proportion", "in proportion"]
    for row in table.itertuples():
        rows = effects[(effects["method"] == row.test) & (effects["scale"] == row.scale)]
        before, after = (sum(map(math.exp, rows[name])) for name in ("log_prob_before", "log_prob"))
        assert row.prob_drop == pytest.approx(100 * (before - after) / before)
        random = effects[(effects["method"] == "random") & (effects["test"] == row.test)]
        random = random[random["scale"] == row.scale]
        counts = [random[kind].sum() / len(random) for kind in ("ffn", "attn")]
        assert [row.random_ffn, row.random_attn] == pytest.approx(counts)
    assert table["gpt2_large_prob_drop"].tolist() == [99.2, 99.2, 95]


def test_heads_of_the_own_type_stand_apart_from_those_of_others():
    rows = [
        (kind, f"{kind}{number}", heads_of, 0.0, 1, math.log(left), 2)
        for kind, own in (("capital", 0.5), ("month", 0.8))
        for number in range(2)
        for heads_of, left in (
            ("capital", own if kind == "capital" else 0.9),
            ("month", own if kind == "month" else 1.0),
            ("random", 1.0),
        )
    ]
    names = "knowledge_type prompt_id heads_of log_prob_before rank_before log_prob rank".split()
    drops = tables.heads_table(pd.DataFrame(rows, columns=names))
    heads = {"capital": (Head(1, 2),), "month": (Head(0, 2),), "random": (Head(0, 0),)}
    summary = tables.heads_summary(drops, heads).set_index("test")
    assert summary["pairs"].tolist() == [2, 2, 0, 2]
    assert math.isnan(summary.loc["heads_other_types_in_common", "prob_drop"])
    assert summary.loc["heads_own_type", "prob_drop"] == pytest.approx((50 + 20) / 2)
    assert summary.loc["heads_other_types", "prob_drop"] == pytest.approx((10 + 0) / 2)
    assert summary.loc["random", "mrr_drop"] == pytest.approx(50)
    assert summary.loc["heads_own_type", "gpt2_large_mrr_drop"] == 44.5
    # one head in common is enough: what is zeroed is in part the type's own
    heads = {**heads, "month": (Head(1, 2), Head(0, 2))}
    summary = tables.heads_summary(drops, heads).set_index("test")
    assert summary["pairs"].tolist() == [2, 0, 2, 2]
    assert math.isnan(summary.loc["heads_other_types", "prob_drop"])
    assert summary.loc["heads_other_types_in_common", "prob_drop"] == pytest.approx((10 + 0) / 2)
    assert math.isnan(summary.loc["heads_other_types_in_common", "gpt2_large_prob_drop"])
    figure = figures.drop_matrix(drops, "drops")
    assert figure.data[0].z[0] == pytest.approx((50, 10))


def test_the_ten_best_layers_are_marked_and_biases_are_none(collected):
    table = layers_by_type(collected["query_layers"], by=["of"])
    for of in ("ffn", "attn"):
        here = table[table["of"] == of]
        ranked = here[here["kind"] != "bias"].sort_values("score", ascending=False, kind="stable")
        assert ranked["rank"].tolist() == list(range(1, 8))
        assert here.loc[here["kind"] == "bias", "rank"].isna().all()
        assert not here.loc[here["kind"] == "bias", "best"].any()
    figure = type_layer_heatmap(table[table["of"] == "ffn"], title="query layers")
    assert figure.data[0].x[0] == "emb" and figure.data[1].z[0][0] is None


def test_sums_curves_and_shares_are_means(collected, results, tmp_path):
    sums = tables.layer_sums(collected["layers"]).set_index("knowledge_type")
    wanted = np.mean([float(each.layer_scores.ffn.sum()) for each in results])
    assert sums.loc["capital", "ffn"] == pytest.approx(wanted, abs=1e-5)
    assert sums.loc["all", "ffn"] == pytest.approx(wanted, abs=1e-5)
    curve = tables.segment_table(collected["segment"])
    last = curve[(curve["knowledge_type"] == "all") & (curve["part"] == 1)].iloc[0]
    assert last["prob"] == pytest.approx(
        100 * np.mean([math.exp(each.log_prob) for each in results]), abs=1e-3
    )
    shared = tables.shared_neurons(collected["neurons"], {"capital": 3})
    counts = collected["neurons"]
    for row in shared.itertuples():
        here = counts[
            (counts["role"] == row.role) & (counts["kind"] == row.kind) & (counts["top"] == row.top)
        ]
        assert row.shared == (here["prompts"] >= 2).sum()
        assert row.percent == pytest.approx(100 * row.shared / row.top)
    depth = tables.query_depth(collected["query_split"])
    assert set(depth["source"]) == {"here", "gpt2-large", "llama-7b"}
    assert depth.groupby("source")["depth"].max().tolist() == [1, 1, 1]


def test_numbers_of_neurons_are_in_proportion_and_never_above_the_published():
    host = open_host(bridge_of("gpt2"))
    large = replace(host, n_layers=36, d_mlp=5120, n_heads=20, d_head=64)
    assert in_proportion(large, "ffn", 1000) == 1000
    assert in_proportion(replace(large, n_layers=72), "attn", 200) == 200
    assert in_proportion(replace(large, n_layers=9), "attn", 200) == 50
    assert in_proportion(replace(large, d_mlp=1), "ffn", 300) == 1


def test_every_figure_can_be_redrawn_from_a_saved_table(collected, tmp_path):
    layers_by_type(collected["layers"]).to_parquet(tmp_path / "layers.parquet")
    table = pd.read_parquet(tmp_path / "layers.parquet")
    fresh = type_layer_heatmap(layers_by_type(collected["layers"])).to_json()
    assert json.loads(type_layer_heatmap(table).to_json()) == json.loads(fresh)
