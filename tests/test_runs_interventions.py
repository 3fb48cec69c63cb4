"""Zeroing in a run: what one prompt at a time gives, beside a control that only the plan draws."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import bundled_model

from tl_neuron_attr import (
    InputError,
    Share,
    Zeroed,
    attribute,
    diff_runs,
    evaluate,
    load_prompts,
    neurons_of,
    read_out,
    run_prompts,
    zeroed_residuals,
)

ZERO = (3, 8)
KEY = ["role", "set", "kind", "count"]


@pytest.fixture(scope="module")
def model():
    return bundled_model()


@pytest.fixture(scope="module")
def prompts():
    return [*load_prompts("capital")[:5:2], *load_prompts("number")[:3:2]]


def run(model, prompts, directory, **given):
    given = {"what": "interventions", "zero": ZERO, "top": 12, "shard_size": 3, **given}
    return run_prompts(model, prompts, directory, **given)


@pytest.fixture(scope="module")
def whole(model, prompts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return run(model, prompts, directory, what="query_neurons,interventions")


def without(result, neurons):
    """log p(target) and its rank, by the model's own definition, one prompt and set at a time."""
    host, prompt = result.host, result.captured.prompt
    with torch.no_grad():
        resid = zeroed_residuals(host, [prompt], [Zeroed(tuple(neurons))])
        logits = read_out(host, resid[0], "recomputed").logits(resid)[0].double()
    own = logits[result.target.id]
    return float(own - logits.logsumexp(0)), 1 + int((logits > own).sum())


def test_rows_are_what_zeroing_the_best_neurons_of_one_prompt_does(model, prompts, whole):
    table = whole.table("interventions")
    for prompt in prompts:
        result = attribute(model, prompt.text, target=prompt.answer, top=12)
        rows = table[table["prompt_id"] == prompt.prompt_id].set_index(KEY)
        assert len(rows) == (3 + 1) * 2 * len(ZERO) and rows.index.is_unique
        before = without(result, ())
        assert np.abs(rows["log_prob_before"] - before[0]).max() < 2e-6
        assert set(rows["rank_before"]) == {before[1]}
        lists = {
            "ffn": neurons_of(result.neurons("ffn")),
            "attn": neurons_of(result.neurons("attn", by_source=False)),
        }
        query = result.query_neurons(12)
        for count in ZERO:
            best = {kind: list(some[:count]) for kind, some in lists.items()}
            sets = {("value", kind): some for kind, some in best.items()}
            sets["value", "both"] = [*best["ffn"], *best["attn"]]
            sets["query", "ffn"] = list(neurons_of(query[query["score"] > 0])[:count])
            for (role, kind), neurons in sets.items():
                row = rows.loc[(role, "top", kind, count)]
                log_prob, rank = without(result, neurons)
                assert row["log_prob"] == pytest.approx(log_prob, abs=1e-5)
                assert row["rank"] == rank and row["zeroed"] == len(neurons)


def test_value_neurons_and_their_control_are_those_of_evaluate(model, prompts, whole):
    found = evaluate(
        model, prompts, neurons="ffn,attn,both", top=ZERO, filtered=False, batch_size=3
    ).effects
    found = found[found["method"].isin(["log_prob_increase", "random"])]
    found = found[found["metric"] == "log_prob"]
    assert len(found) == len(prompts) * 3 * 2 * len(ZERO)
    ours = whole.table("interventions").set_index(["prompt_id", *KEY])
    for row in found.itertuples():
        chosen = "random" if row.method == "random" else "top"
        here = ours.loc[(row.prompt_id, "value", chosen, row.kind, row.top)]
        assert here["log_prob"] == pytest.approx(row.after, abs=1e-6)
        assert here["log_prob_before"] == pytest.approx(row.before, abs=1e-6)


def test_random_neurons_depend_on_the_prompt_and_the_seed_alone(model, prompts, whole, tmp_path):
    first = whole.table("interventions").set_index(["prompt_id", *KEY])
    given = {"what": "query_neurons,interventions"}
    other = run(model, prompts[::-1], tmp_path / "order", batch_size=1, shard_size=2, **given)
    found = other.table("interventions").set_index(["prompt_id", *KEY]).loc[first.index]
    for column in ("log_prob", "log_prob_before"):
        assert np.abs(found[column] - first[column]).max() < 1e-6
    for column in ("rank", "rank_before", "zeroed"):
        assert found[column].tolist() == first[column].tolist()
    seeded = run(model, prompts, tmp_path / "seed", seed=1, **given)
    found = seeded.table("interventions").set_index(["prompt_id", *KEY])
    same = (found["log_prob"] - first["log_prob"]).abs() < 1e-6
    assert same[found.index.get_level_values("set") == "top"].all()
    # a few that do nothing, drawn in place of a few others that do nothing
    assert same[found.index.get_level_values("set") == "random"].mean() < 0.3


def test_shares_done_apart_give_the_same_bytes(model, prompts, whole, tmp_path):
    for rank in (1, 0):
        run(
            model,
            prompts,
            tmp_path / "run",
            what="query_neurons,interventions",
            share=Share(rank=rank, of=2),
        )
    for path in whole.directory.rglob("*.parquet"):
        name = path.relative_to(whole.directory)
        assert (tmp_path / "run" / name).read_bytes() == path.read_bytes(), name


def test_without_query_neurons_no_query_neurons_are_zeroed(model, prompts, tmp_path):
    found = run(model, prompts[:2], tmp_path / "run", zero=None).table("interventions")
    assert set(found["role"]) == {"value"} and set(found["count"]) == {10}


def test_of_a_contrast_it_is_the_difference(model, tmp_path):
    asked = {"text": "The capital of France is", "target": " Paris", "against": " Rome"}
    contrast = run(model, [asked], tmp_path / "contrast", zero=5).table("interventions")
    result = attribute(model, asked["text"], target=" Paris", against=" Rome", top=5)
    other = attribute(model, asked["text"], target=" Rome", top=5)
    row = contrast.set_index(KEY).loc[("value", "top", "ffn", 5)]
    best = neurons_of(result.neurons("ffn"))
    difference = without(result, best)[0] - without(other, best)[0]
    assert row["log_prob"] == pytest.approx(difference, abs=1e-5)
    assert row["rank"] == without(result, best)[1]


def test_a_summary_has_no_probability_where_contrasts_are_among_the_prompts(model, tmp_path):
    text = "The capital of France is"
    asked = [
        {"text": text, "knowledge_type": "plain"},
        {"text": text, "target": " Paris", "against": " Rome", "knowledge_type": "contrast"},
    ]
    found = run(model, asked, tmp_path / "run", zero=2).summary().interventions
    found = found.set_index("knowledge_type")
    assert found.loc["plain", ["prob", "prob_before"]].stack().between(0, 1).all()
    assert found.loc[["contrast", "all"], ["prob", "prob_before"]].isna().all(axis=None)
    assert found["mrr"].notna().all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero": 0}, "a number of neurons to zero must be at least 1"),
        ({"zero": "3,3"}, "zero must be one or several different numbers"),
        ({"zero": "some"}, "zero must be numbers of neurons, like 10 or 10,30"),
        ({"zero": 10**6}, "zero is 1000000, but the model has 3072 ffn neurons"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"what": "neurons"}, "zero is given, but what does not ask for the table interventions"),
        ({"what": "neurons", "zero": None, "seed": 3}, "seed is given, but what does not ask"),
    ],
)
def test_what_cannot_be_zeroed_is_refused_before_anything_is_made(
    model, prompts, tmp_path, given, message
):
    with pytest.raises(InputError, match=message):
        run(model, prompts, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


# --- over prompts -----------------------------------------------------------------------------


def test_the_summary_holds_means_over_prompts(whole):
    table = whole.table("interventions")
    table = pd.concat([table, table.assign(knowledge_type="all")])
    table = table.assign(
        change=table["log_prob"] - table["log_prob_before"],
        prob=np.exp(table["log_prob"]),
        prob_before=np.exp(table["log_prob_before"]),
        mrr=1 / table["rank"],
        mrr_before=1 / table["rank_before"],
    )
    key = ["knowledge_type", *KEY]
    found = whole.summary().interventions.set_index(key)
    columns = ["zeroed", "log_prob_before", "log_prob", "change", "prob_before", "prob"]
    columns += ["mrr_before", "mrr"]
    wanted = table.groupby(key)[columns].mean().loc[found.index]
    assert np.allclose(found[columns], wanted, atol=1e-9) and len(found) == 3 * 16
    assert found["prompts"].tolist() == table.groupby(key).size().loc[found.index].tolist()
    assert found.loc[("all", "value", "top", "ffn", 8), "change"] < -0.5
    saved = pd.read_parquet(whole.directory / "summary_interventions.parquet")
    assert saved.equals(whole.summary().interventions)


def test_runs_are_compared_set_by_set(model, prompts, whole, tmp_path):
    other = run(model, prompts[1:], tmp_path / "run", zero="8,9", convention="published")
    found = diff_runs(whole, other).interventions
    assert len(found) == 4 * 3 * 2 and set(found["count"]) == {8}
    first = whole.table("interventions").set_index(["prompt_id", *KEY])
    second = other.table("interventions").set_index(["prompt_id", *KEY])
    for row in found.rename(columns={"count": "zeroed"}).itertuples():
        key = (row.prompt_id, row.role, row.set, row.kind, row.zeroed)
        one, two = (
            table.loc[key, "log_prob"] - table.loc[key, "log_prob_before"]
            for table in (first, second)
        )
        assert (row.change, row.change_second) == (one, two) and row.difference == two - one
