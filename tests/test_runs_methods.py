"""Other methods in a run: what each gives of one prompt by itself, from the capture there is."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import bundled_model, count_forward_passes, own_bridge_of

import tl_neuron_attr.runs.measured as measured
from tl_neuron_attr import (
    METHODS,
    Case,
    InputError,
    Share,
    attribute,
    best_neurons,
    diff_runs,
    load_prompts,
    open_host,
    run_prompts,
)
from tl_neuron_attr.host import Host
from tl_neuron_attr.runs.settings import RunSettings

TOP = 7
NAMES = ("log_prob_increase", "prob_increase", "norm", "coefficient_rank", "gradient_activation")


@pytest.fixture(scope="module")
def model():
    return bundled_model()


@pytest.fixture(scope="module")
def prompts():
    return [*load_prompts("capital")[:3:2], *load_prompts("number")[:3:2]]


def run(model, prompts, directory, **given):
    given = {"what": "methods", "methods": NAMES, "top": TOP, "shard_size": 3, **given}
    return run_prompts(model, prompts, directory, **given)


@pytest.fixture(scope="module")
def whole(model, prompts, tmp_path_factory):
    return run(model, prompts, tmp_path_factory.mktemp("runs") / "whole", what="methods,neurons")


def test_rows_are_what_each_method_gives_of_one_prompt(model, prompts, whole):
    table = whole.table("methods")
    assert len(table) == len(prompts) * len(NAMES) * 2 * TOP and table["source_pos"].isna().all()
    for prompt in prompts:
        result = attribute(model, prompt.text, target=prompt.answer, top=TOP)
        activations = {"ffn": result.captured.mlp_post, "attn": result.captured.z}
        for name in NAMES:
            for kind, coefficients in activations.items():
                scores = METHODS[name](Case(result=result), kind, None)
                of_prompt = table["prompt_id"] == prompt.prompt_id
                rows = table[of_prompt & (table["method"] == name) & (table["kind"] == kind)]
                wanted = best_neurons(scores, TOP)
                heads = [getattr(neuron, "head", -1) for neuron in wanted]
                assert rows["layer"].tolist() == [neuron.layer for neuron in wanted]
                assert rows["head"].fillna(-1).tolist() == heads
                assert rows["index"].tolist() == [neuron.index for neuron in wanted]
                assert rows["rank"].tolist() == [*range(1, TOP + 1)]
                places = [
                    (n.layer, n.index) if kind == "ffn" else (n.layer, n.head, n.index)
                    for n in wanted
                ]
                for column, values in (("score", scores), ("coefficient", coefficients)):
                    expected = np.array([float(values[place]) for place in places])
                    assert np.abs(rows[column] - expected).max() < 1e-6 * max(
                        1, np.abs(expected).max()
                    )


def test_batches_and_shares_change_no_row(model, prompts, whole, tmp_path):
    first = whole.table("methods")
    single = run(model, prompts, tmp_path / "single", batch_size=1).table("methods")
    ids = ["row", "method", "kind", "layer", "head", "index", "rank"]
    assert single[ids].equals(first[ids])
    assert np.allclose(single["score"], first["score"], rtol=1e-6, atol=1e-6)
    for rank in (1, 0):
        share = Share(rank=rank, of=2)
        run(model, prompts, tmp_path / "shared", share=share, what="methods,neurons")
    for path in (tmp_path / "shared" / "methods").iterdir():
        assert path.read_bytes() == (whole.directory / "methods" / path.name).read_bytes()


def test_a_static_method_does_not_run_the_model_again(model, prompts, tmp_path, monkeypatch):
    passes = count_forward_passes(model, monkeypatch)
    run_prompts(model, prompts, tmp_path / "neurons", top=TOP)
    alone = len(passes)
    static = "log_prob_increase,log_prob,norm,coefficient,coefficient_norm,direct_logit"
    run(model, prompts, tmp_path / "static", methods=static, shard_size=256)
    assert alone > 0 and len(passes) == 2 * alone
    run(model, prompts, tmp_path / "again", methods="gradient_activation", shard_size=256)
    assert len(passes) > 3 * alone


def test_letters_and_names_are_one_and_part_of_the_plan(model, prompts, tmp_path, whole):
    run(model, prompts[:2], tmp_path / "run", methods="a, d")
    found = run(model, prompts[:2], tmp_path / "run", methods=["log_prob_increase", "norm"])
    assert found.settings.methods == ("log_prob_increase", "norm")
    with pytest.raises(InputError, match="its settings.methods is .*'norm'"):
        run(model, prompts[:2], tmp_path / "run", methods="a")
    assert whole.settings.plain()["methods"] == [*NAMES]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ()}, "the table methods needs methods: give some of log_prob_increase"),
        ({"what": "neurons"}, "methods are given, but what does not ask for the table methods"),
        ({"methods": "words"}, "there is no method 'words'"),
        ({"methods": "a,log_prob_increase"}, "a method is given twice"),
        ({"methods": "attribution_patching"}, "needs a corrupted prompt beside each"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_made(
    model, prompts, tmp_path, given, message
):
    with pytest.raises(InputError, match=message):
        run(model, prompts, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_function_of_ones_own_is_refused():
    """Workers, which look methods up, could not find it."""
    with pytest.raises(InputError, match="a run takes methods by name, for workers look them up"):
        RunSettings.of(
            what="methods",
            batch_size=None,
            methods=METHODS["norm"],
            top=1,
            budget=1,
            shard_size=1,
            threads=1,
            convention="exact",
        )


def test_a_method_the_model_does_not_admit_is_refused_before_it_is_run(tmp_path, monkeypatch):
    model = own_bridge_of("gpt2")
    passes = count_forward_passes(model, monkeypatch)
    with torch.inference_mode():
        frozen = torch.zeros(3)
    monkeypatch.setattr(Host, "parameters", property(lambda _: [frozen]))
    with pytest.raises(InputError, match=r"made under torch.inference_mode"):
        run(model, [[1, 2]], tmp_path / "run", methods="curved_gradient")
    assert not passes and not (tmp_path / "run").exists()


def test_without_layers_before_the_last_the_query_method_is_refused_before_it_is_run(
    monkeypatch,
):
    model = own_bridge_of("gpt2")
    passes = count_forward_passes(model, monkeypatch)
    host = replace(open_host(model), n_layers=1)
    settings = RunSettings(what=("methods",), methods=("query",))
    with pytest.raises(InputError, match="needs layers before .* the model has one layer; leave"):
        measured.check_measurable(host, settings)
    measured.check_measurable(host, replace(settings, methods=("norm",)))
    assert not passes


def test_a_contrast_is_a_failed_prompt_where_a_method_has_no_score_of_it(model, tmp_path):
    contrast = {"text": "The capital of France is", "target": " Paris", "against": " Rome"}
    asked = [contrast, {**contrast, "against": None}]
    found = run(model, asked, tmp_path / "run", methods="a,f")
    assert found.table("errors")["stage"].tolist() == ["planning"]
    assert "the method rank has no scores of a contrast" in found.table("errors")["reason"][0]
    assert len(found.table("answers")) == 1
    linear = run(model, asked, tmp_path / "linear", methods="a,d,direct_logit")
    assert len(linear.table("answers")) == 2


def test_a_method_that_fails_on_a_prompt_makes_it_a_row_of_errors(
    model, prompts, whole, tmp_path, monkeypatch
):
    victim = prompts[1].prompt_id

    def failing(case, kind, top=None):
        if case.result.captured.prompt.prompt_id == victim:
            raise InputError("it cannot be had")
        return METHODS["norm"](case, kind, top)

    monkeypatch.setattr(measured, "METHODS", {**METHODS, "norm": failing})
    found = run(model, prompts, tmp_path / "run")
    errors = found.table("errors")
    assert errors["prompt_id"].tolist() == [victim]
    assert errors["reason"].tolist() == ["method norm: it cannot be had"]
    first = whole.table("methods")
    first = first[first["prompt_id"] != victim].reset_index(drop=True)
    others = found.table("methods")
    assert others["index"].tolist() == first["index"].tolist()
    assert np.allclose(others["score"], first["score"], rtol=1e-6, atol=1e-6)


# --- what methods have in common --------------------------------------------------------------


def with_all(table):
    return pd.concat([table, table.assign(knowledge_type="all")], ignore_index=True)


def test_the_summary_counts_each_methods_neurons(whole):
    table = with_all(whole.table("methods"))
    table["head"] = table["head"].fillna(-1)
    key = ["knowledge_type", "method", "kind", "layer", "head", "index"]
    wanted = table.groupby(key)["score"].agg(["count", "mean"])
    found = whole.summary().methods
    found = found.assign(head=found["head"].fillna(-1)).set_index(key)
    assert len(found) == len(wanted) and found.index.is_unique
    wanted = wanted.loc[found.index]
    assert found["prompts"].tolist() == wanted["count"].tolist()
    assert np.allclose(found["mean_score"], wanted["mean"], rtol=1e-5)
    prompts = found.index.get_level_values(0).map({"capital": 2, "number": 2, "all": 4})
    assert np.allclose(found["share"], found["prompts"] / prompts)


def test_the_summary_says_how_far_methods_agree(whole):
    table = whole.table("methods")
    found = whole.summary().overlap
    assert len(found) == math.comb(len(NAMES), 2) * 2 * 3
    place = ["layer", "head", "index"]
    lists = {
        key: set(map(tuple, rows[place].fillna(-1).to_numpy()))
        for key, rows in table.groupby(["row", "kind", "method"])
    }
    of_row = table.drop_duplicates("row").set_index("row")["knowledge_type"]
    for one, other in combinations(NAMES, 2):
        for kind in ("ffn", "attn"):
            each = {
                row: len(lists[row, kind, one] & lists[row, kind, other])
                / len(lists[row, kind, one] | lists[row, kind, other])
                for row in of_row.index
            }
            for name in ("capital", "number", "all"):
                wanted = [each[row] for row in each if name in ("all", of_row[row])]
                line = found[
                    (found["method"] == one)
                    & (found["other"] == other)
                    & (found["kind"] == kind)
                    & (found["knowledge_type"] == name)
                ]
                assert line["overlap"].tolist() == pytest.approx([np.mean(wanted)])
                assert line["prompts"].tolist() == [len(wanted)]


def test_what_is_kept_at_the_end_is_the_summary(whole):
    for name, table in whole.summary().tables.items():
        assert pd.read_parquet(whole.directory / f"{name}.parquet").equals(table), name


def test_runs_are_compared_method_by_method(model, prompts, whole, tmp_path):
    other = run(model, prompts[1:], tmp_path / "run", methods="norm,prob_increase,log_prob", top=5)
    found = diff_runs(whole, other).methods
    assert set(found["method"]) == {"norm", "prob_increase"}
    assert len(found) == 3 * 2 * 2
    assert np.allclose(found["overlap"], 5 / TOP) and (found["common"] == 5).all()
    assert (found["score_difference"] < 1e-6).all()
