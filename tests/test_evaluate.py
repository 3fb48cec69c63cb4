"""The paper's test: every number is that of one run with exactly those neurons zeroed."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
from conftest import (
    FAMILIES,
    bridge_of,
    bundled_model,
    count_forward_passes,
    hooked_of,
    needs_hooked_transformer,
    own_bridge_of,
)

from tl_neuron_attr import InputError, attribute
from tl_neuron_attr.evaluate import CONTROLS, METRICS, evaluate, load_evaluation
from tl_neuron_attr.evaluate.effects import conditions, ranked
from tl_neuron_attr.evaluate.evaluation import (
    CURVE_COLUMNS,
    EFFECT_COLUMNS,
    PREDICTED_COLUMNS,
    Evaluation,
)
from tl_neuron_attr.evaluate.run import corrupted_in
from tl_neuron_attr.host import open_host
from tl_neuron_attr.knowledge import AskedPrompt, Fact, KnowledgePrompt, KnownPrompts, load_prompts
from tl_neuron_attr.knowledge.known import drawn_evenly
from tl_neuron_attr.methods import METHODS, Case
from tl_neuron_attr.prompts import Prompt
from tl_neuron_attr.targets import tokenize

SENTENCES = {
    "a/0": ((3, 17, 5, 40, 8, 22), 9),
    "a/1": ((3, 17, 5, 41, 8), 4),
    "b/0": ((7, 7, 1, 2, 9, 30, 31), 9),
}


def known(model, sentences=SENTENCES):
    """Prompts of token ids, as if the filter had kept them."""
    host = open_host(model)
    kept = []
    for prompt_id, (tokens, target) in sentences.items():
        knowledge_type = prompt_id.split("/")[0]
        fact = Fact(knowledge_type=knowledge_type, relation="r", subject=prompt_id, answer="w")
        prompt = KnowledgePrompt(
            prompt_id=prompt_id, text="t", answer=" w", fact=fact, phrasing="t", held_out=False
        )
        tokenized = tokenize(host, Prompt(tokens=tokens, target=target, prompt_id=prompt_id))
        kept.append(AskedPrompt(prompt=prompt, tokenized=tokenized, log_prob=0.0, rank=1))
    return KnownPrompts(kept=tuple(kept), dropped=(), top=None, above_type=False)


def by_size(case, kind, top):
    """A user's own method: the size of the contribution, times a sign from the target."""
    return METHODS["coefficient_norm"](case, kind, top)


def left_without(model, tokens, target, neurons):
    """log p and rank of the target in one run, by definition: hooks on coefficients and z."""

    def zeroing(layer, kind):
        def hook(activation, hook):
            activation = activation.clone()
            for each in neurons:
                if each[0] == kind and each[1] == layer:
                    activation[(..., *each[2:])] = 0.0
            return activation

        return hook

    names = {"ffn": "mlp.hook_post", "attn": "attn.hook_z"}
    hooks = [
        (f"blocks.{layer}.{names[kind]}", zeroing(layer, kind))
        for kind, layer in {each[:2] for each in neurons}
    ]
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=hooks)
    log_probs = logits[0, -1].float().log_softmax(-1)
    return float(log_probs[target]), 1 + int((log_probs > log_probs[target]).sum())


def best_neurons(scores, kind, top):
    """By definition: all places, sorted; ties by layer, then place."""
    places = [(kind, *place) for place in np.ndindex(*scores.shape)]
    return sorted(places, key=lambda place: -float(scores[place[1:]]))[:top]


def check_by_definition(model, which):
    with torch.no_grad():
        table = evaluate(
            model, known(model), ["a", by_size], neurons=which, top=(3, 8), batch_size=2
        ).effects
    assert [*table.columns] == [*EFFECT_COLUMNS]
    kinds = ("ffn", "attn") if which == "both" else (which,)
    methods = {"log_prob_increase": METHODS["log_prob_increase"], "by_size": by_size}
    for prompt_id, (tokens, target) in SENTENCES.items():
        case = Case(result=attribute(model, tokens, target=target, top=8))
        before = left_without(model, tokens, target, [])
        for name, method in methods.items():
            for top in (3, 8):
                neurons = [
                    each
                    for kind in kinds
                    for each in best_neurons(method(case, kind, None), kind, top)
                ]
                after = left_without(model, tokens, target, neurons)
                rows = table[
                    (table["prompt_id"] == prompt_id)
                    & (table["method"] == name)
                    & (table["top"] == top)
                ].set_index("metric")
                assert set(rows["kind"]) == {which} and len(rows) == 3
                assert set(rows["knowledge_type"]) == {prompt_id[0]}
                for column, (log_prob, rank) in (("before", before), ("after", after)):
                    assert rows[column]["log_prob"] == pytest.approx(log_prob, abs=3e-5)
                    assert rows[column]["prob"] == pytest.approx(np.exp(log_prob), abs=1e-5)
                    assert rows[column]["reciprocal_rank"] == 1 / rank
    assert table["after"].nunique() > 20


@pytest.mark.parametrize("which", ["ffn", "attn", "both"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_effect_is_that_of_one_run_without_those_neurons(family, which):
    check_by_definition(bridge_of(family), which)


@pytest.mark.parametrize("family", [each for each in FAMILIES if each not in ("gpt2", "llama")])
def test_every_effect_is_that_of_one_run_on_every_family(family):
    check_by_definition(bridge_of(family), "both")


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_effect_is_that_of_one_run_on_the_other_class(family):
    check_by_definition(hooked_of(family), "both")


@pytest.mark.parametrize("which", ["ffn", "both"])
def test_controls_are_of_the_first_methods_layers_and_measured_like_it(tiny_model, which):
    asked = known(tiny_model)
    table = evaluate(tiny_model, asked, ["a", "d"], neurons=which, top=(4, 9), seed=5).effects
    for prompt_id, (tokens, target) in SENTENCES.items():
        result = attribute(
            tiny_model, Prompt(tokens=tokens, target=target, prompt_id=prompt_id), top=9
        )
        methods = {name: METHODS[name] for name in ("log_prob_increase", "norm")}
        kinds = ("ffn",) if which == "ffn" else ("ffn", "attn")
        found = ranked(Case(result=result), methods, kinds, 9)
        made = conditions(found, (which,), (4, 9), "log_prob_increase", 5)
        chosen = {each.top: each.neurons for each in made if each.method == "log_prob_increase"}
        controls = [each for each in made if each.method in CONTROLS]
        assert [(each.method, each.top) for each in controls] == [
            (name, top) for name in CONTROLS for top in (4, 9)
        ]
        for control in controls:
            neurons = []
            for kind in kinds:
                ours, theirs = control.neurons[kind], chosen[control.top][kind]
                shape = found.scores["norm"][kind].shape
                per_layer = shape[1:].numel()
                assert (ours // per_layer).tolist() == sorted((theirs // per_layer).tolist())
                assert not set(ours.tolist()) & set(theirs.tolist())
                neurons += [
                    (kind, *map(int, np.unravel_index(each, shape))) for each in ours.tolist()
                ]
            after = left_without(tiny_model, tokens, target, neurons)
            row = table[
                (table["prompt_id"] == prompt_id)
                & (table["method"] == control.method)
                & (table["top"] == control.top)
                & (table["metric"] == "log_prob")
            ]
            assert row["after"].item() == pytest.approx(after[0], abs=3e-5)


def test_a_planted_neuron_is_what_the_answer_rests_on():
    model = own_bridge_of("gpt2")
    with torch.no_grad():
        model.blocks[1].mlp.W_out[7] = 40 * model.W_U[:, 9] / model.W_U[:, 9].norm()
        model.blocks[1].mlp.b_in[7] += 3.0
    found = evaluate(model, known(model, {"a/0": SENTENCES["a/0"]}), "a", top=1)
    after = found.effects[found.effects["metric"] == "log_prob"].set_index("method")
    change = after["after"] - after["before"]
    assert change["log_prob_increase"] < -2
    assert abs(change["random"]) < 0.2 and abs(change["norm_matched"]) < 0.2


def test_what_is_measured_does_not_depend_on_batches_or_on_what_else_is_asked(tiny_model):
    asked = known(tiny_model)
    arguments = dict(methods="a,e", neurons=("ffn", "attn", "both"), top=(2, 6), seed=3)
    whole = evaluate(tiny_model, asked, **arguments).effects
    for batch_size in (1, 2):
        other = evaluate(tiny_model, asked, **arguments, batch_size=batch_size).effects
        pd.testing.assert_frame_equal(other, whole, atol=1e-5, rtol=0)
    limited = evaluate(tiny_model, asked, **arguments, limit=2).effects
    ids = limited["prompt_id"].unique().tolist()
    assert [each[0] for each in ids] == ["a", "b"]
    same = whole[whole["prompt_id"].isin(ids)].reset_index(drop=True)
    pd.testing.assert_frame_equal(limited, same, atol=1e-5, rtol=0)
    reseeded = evaluate(tiny_model, asked, **{**arguments, "seed": 4}).effects
    moved = (reseeded["after"] - whole["after"]).abs() > 1e-4
    assert set(reseeded.loc[moved, "method"]) == {"random"}


def test_each_prompt_has_random_neurons_of_its_own(tiny_gpt2):
    tokens = SENTENCES["a/0"]
    table = evaluate(tiny_gpt2, known(tiny_gpt2, {"a/0": tokens, "a/1": tokens}), "a").effects
    after = table[table["metric"] == "log_prob"].pivot(
        index="method", columns="prompt_id", values="after"
    )
    apart = (after["a/0"] - after["a/1"]).abs()
    assert apart["log_prob_increase"] < 1e-5 and apart["norm_matched"] < 1e-5
    assert apart["random"] > 1e-3


def test_a_limit_draws_evenly_and_a_smaller_one_some_of_the_same(tiny_gpt2):
    sentences = {f"{name}/{n}": ((1, 2, 3), 9) for name in "aaabbc" for n in range(7)}
    found = known(tiny_gpt2, sentences)
    few, more = found.drawn(6), found.drawn(9)
    assert [each.prompt.prompt_id[0] for each in few] == ["a"] * 2 + ["b"] * 2 + ["c"] * 2
    assert {each.prompt.prompt_id for each in few} <= {each.prompt.prompt_id for each in more}
    assert drawn_evenly(found.kept, None, 0) == found.drawn(100) == found.kept
    assert found.drawn(6, seed=1) != few
    ran = evaluate(tiny_gpt2, found, "norm", limit=6)
    assert ran.prompts["prompt_id"].tolist() == [each.prompt.prompt_id for each in few]


def test_zeroing_one_neuron_does_what_exact_ablation_predicts(tiny_model):
    found = evaluate(tiny_model, known(tiny_model), "ablation", neurons=("ffn", "attn"), top=1)
    table = found.predicted
    assert [*table.columns] == [*PREDICTED_COLUMNS] and len(table) == 6
    assert table["predicted"].tolist() == pytest.approx(table["measured"].tolist(), abs=3e-5)
    effects = found.effects[
        (found.effects["metric"] == "log_prob") & (found.effects["method"] == "ablation")
    ]
    change = effects["after"] - effects["before"]
    assert table["measured"].tolist() == pytest.approx(change.tolist())
    calibration = found.calibration()
    assert calibration["unit"].tolist() == ["nats"] * 2
    assert calibration["slope"].tolist() == pytest.approx([1, 1], abs=1e-3)
    assert calibration["correlation"].tolist() == pytest.approx([1, 1], abs=1e-3)


def test_what_is_predicted_is_the_sum_of_the_scores(tiny_model):
    found = evaluate(tiny_model, known(tiny_model), "a", neurons="both", top=5).predicted
    for number, (tokens, target) in enumerate(SENTENCES.values()):
        case = Case(result=attribute(tiny_model, tokens, target=target, top=5))
        sums = [
            METHODS["log_prob_increase"](case, kind, None).flatten().topk(5).values.sum()
            for kind in ("ffn", "attn")
        ]
        assert found["predicted"][number] == pytest.approx(-float(sum(sums)), abs=1e-4)


def test_rank_correlations_are_over_all_neurons(tiny_model):
    found = evaluate(
        tiny_model, known(tiny_model), ["a", "ablation", "d"], neurons="both", correlate=True
    )
    table = found.correlations
    for number, (tokens, target) in enumerate(SENTENCES.values()):
        case = Case(result=attribute(tiny_model, tokens, target=target, top=5))
        of_prompt = table[table["prompt_id"] == [*SENTENCES][number]]
        for kind in ("ffn", "attn"):
            exact = METHODS["ablation"](case, kind, None).flatten()
            ours = METHODS["log_prob_increase"](case, kind, None).flatten()
            rows = of_prompt[of_prompt["kind"] == kind].set_index("method")["spearman"]
            assert rows["ablation"] == 1
            assert rows["log_prob_increase"] == pytest.approx(
                scipy.stats.spearmanr(ours, exact).statistic, abs=1e-4
            )
    summary = found.rank_correlation()
    whole = summary[(summary["knowledge_type"] == "all") & (summary["kind"] == "ffn")]
    of_kind = table[table["kind"] == "ffn"].groupby("method")["spearman"].mean()
    assert whole.set_index("method")["spearman"].to_dict() == pytest.approx(of_kind.to_dict())
    with pytest.raises(InputError, match="correlate=True"):
        evaluate(tiny_model, known(tiny_model), "d").rank_correlation()


def test_a_method_that_cannot_be_used_on_a_prompt_is_left_out_there_and_listed(tiny_model):
    def fussy(case, kind, top):
        if case.result.captured.prompt.prompt_id == "a/1":
            raise InputError("not this one")
        return METHODS["norm"](case, kind, top)

    found = evaluate(tiny_model, known(tiny_model), [fussy, "coefficient"], top=2)
    assert found.skipped.to_dict("records") == [
        {"prompt_id": "a/1", "method": "fussy", "reason": "not this one"}
    ]
    assert found.facts["without"] == {"fussy": 1}
    counts = found.effects.groupby("method")["prompt_id"].nunique()
    # controls stand beside the first method, so they are left out with it
    assert counts.to_dict() == {"fussy": 2, "coefficient": 3, "random": 2, "norm_matched": 2}
    summary = found.summary()
    assert set(summary.loc[summary["method"] == "fussy", "prompts"]) == {1, 2}
    compared = found.comparisons(to="fussy")
    assert set(compared["prompts"]) == {2} and len(compared) == 9

    def impossible(case, kind, top):
        raise InputError("never")

    said = "'impossible' can be used on none of the prompts: never"
    with pytest.raises(InputError, match=f"{said}; controls stand beside the first"):
        evaluate(tiny_model, known(tiny_model), [impossible, "d"])
    with pytest.warns(UserWarning, match=said):
        found = evaluate(tiny_model, known(tiny_model), ["d", impossible], top=2)
    assert found.facts["methods"] == ["norm"] and found.facts["without"] == {"impossible": 3}
    assert {*found.effects["method"]} == {"norm", "random", "norm_matched"}
    assert len(found.skipped) == 3 and said in found.facts["warnings"][-1]
    assert {*found.comparisons()["other"]} <= {"norm", "random", "norm_matched"}


def test_a_seed_below_zero_is_refused_before_the_first_run(tiny_model, monkeypatch):
    passes = count_forward_passes(tiny_model, monkeypatch)
    with pytest.raises(InputError, match="seed must be at least 0, got -1"):
        evaluate(tiny_model, "capital", "d", seed=-1)
    assert not passes


def test_what_reading_a_file_had_to_say_is_kept_with_the_result(tmp_path):
    path = tmp_path / "twice.jsonl"
    line = '{"text": "The capital of France is", "answer": "Paris"}\n'
    other = '{"text": "The capital of Italy is", "answer": "Rome"}\n'
    path.write_text(line + other + line)
    with pytest.warns(UserWarning) as caught:
        found = evaluate(bundled_model(), path, "d", top=2)
    said = [message for message in found.facts["warnings"] if "line" in message]
    assert len(said) == 1 and any(said[0] in str(warning.message) for warning in caught)
    assert found.facts["prompts"]["measured"] == 2


def test_each_prompt_is_patched_from_another_of_its_wording():
    asked = known(bridge_of("gpt2")).kept
    assert corrupted_in(asked, asked, 0) == [None, None, None]  # none is as long, or all one answer
    some = [each for each in load_prompts("month") if each.phrasing == "{subject} falls in"]
    found = evaluate(bundled_model(), some[:12], "d,attribution_patching", top=3)
    counts = found.effects.groupby("method")["prompt_id"].nunique()
    assert counts["norm"] == 12 and counts["attribution_patching"] >= 10


# --- tables -----------------------------------------------------------------------------------


def made(after, before=None, types=None, tops=(10,), facts=None):
    """An evaluation of given numbers: ``after[method]`` is [prompt, top] of every metric."""
    rows = []
    n = len(next(iter(after.values())))
    types = types or ["x"] * n
    before = [0.9] * n if before is None else before
    for prompt in range(n):
        for method, values in after.items():
            for place, top in enumerate(tops):
                for metric in METRICS:
                    value = np.atleast_2d(np.array(values).T).T[prompt, place]
                    key = (f"p{prompt}", types[prompt], method, "ffn", top, metric)
                    rows.append((*key, before[prompt], value))
    prompts = [(f"p{k}", types[k], "r", (facts or range(n))[k], "w", "t") for k in range(n)]
    nothing = pd.DataFrame(columns=["prompt_id", "method"])
    return Evaluation(
        effects=pd.DataFrame(rows, columns=list(EFFECT_COLUMNS)),
        prompts=pd.DataFrame(
            prompts,
            columns=["prompt_id", "knowledge_type", "relation", "subject", "answer", "text"],
        ),
        skipped=nothing,
        predicted=nothing,
        correlations=nothing,
        facts={
            "methods": [name for name in after if name not in CONTROLS],
            "kinds": ["ffn"],
            "seed": 0,
            "in_nats": [],
        },
    )


def test_the_mrr_is_the_mean_of_the_reciprocal_ranks():
    ranks = {"one": [1.0, 0.5, 0.25, 1.0], "random": [1.0, 1.0, 1.0, 1.0]}
    table = made(ranks, types=["x", "x", "y", "y"]).summary()
    rows = table[table["metric"] == "reciprocal_rank"].set_index(["knowledge_type", "method"])
    assert rows.loc[("all", "one"), "after"] == 0.6875
    assert rows.loc[("x", "one"), "after"] == 0.75 and rows.loc[("y", "one"), "prompts"] == 2
    assert rows.loc[("all", "one"), "change"] == pytest.approx(0.6875 - 0.9)
    assert rows.loc[("y", "one"), "after_low"] == 0.25 and rows.loc[("y", "one"), "after_high"] == 1
    assert rows.loc[("all", "random"), ["before", "after_low", "after_high"]].tolist() == [
        pytest.approx(0.9),
        1,
        1,
    ]
    assert [*table["knowledge_type"].unique()] == ["all", "x", "y"]


def test_curves_begin_with_the_prompt_as_it_is_and_areas_are_their_mean_heights():
    found = made({"one": [[0.8, 0.2], [0.6, 0.0]]}, before=[1.0, 0.8], tops=(10, 30))
    curves = found.curves()
    assert [*curves.columns] == [*CURVE_COLUMNS]
    own = curves[(curves["knowledge_type"] == "all") & (curves["metric"] == "prob")]
    assert own["top"].tolist() == [0, 10, 30]
    assert own["mean"].tolist() == pytest.approx([0.9, 0.7, 0.1])
    areas = found.areas(log=False)
    area = areas[(areas["knowledge_type"] == "all") & (areas["metric"] == "prob")]["area"].item()
    assert area == pytest.approx(np.trapezoid([0.9, 0.7, 0.1], [0, 10, 30]) / 30)
    areas = found.areas()
    area = areas[(areas["knowledge_type"] == "all") & (areas["metric"] == "prob")]["area"].item()
    places = np.log([1, 11, 31])
    assert area == pytest.approx(np.trapezoid([0.9, 0.7, 0.1], places) / places[-1])


def test_methods_are_compared_prompt_by_prompt_with_false_discoveries_controlled():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, size=40)  # prompts differ far more than methods do
    after = {
        "one": hard - 1 + rng.normal(0, 0.1, 40),
        "two": hard + rng.normal(0, 0.1, 40),
        "three": hard + rng.normal(0, 0.1, 40),
        "random": hard + 3,
    }
    found = made(after)
    table = found.comparisons(metrics=["log_prob"]).set_index(["method", "other"])
    assert len(table) == 6
    assert table.loc[("one", "two"), "difference"] == pytest.approx(
        (after["one"] - after["two"]).mean()
    )
    assert table.loc[("one", "two"), "high"] < 0 and table.loc[("one", "two"), "q"] < 0.001
    assert table.loc[("two", "three"), "q"] > 0.05
    assert table["q"].tolist() == pytest.approx(
        scipy.stats.false_discovery_control(table["p"]).tolist()
    )
    paired = scipy.stats.permutation_test(
        (after["two"] - after["three"],), np.mean, permutation_type="samples", rng=rng
    )
    assert table.loc[("two", "three"), "p"] == pytest.approx(paired.pvalue, abs=0.03)
    to_random = found.comparisons(to="random", metrics=["prob"])
    assert to_random["method"].tolist() == ["one", "two", "three"]
    assert set(to_random["other"]) == {"random"}
    by_area = found.comparisons(area=True)
    assert "top" not in by_area.columns and len(by_area) == 18
    with pytest.raises(InputError, match="to must be one of one, two, three, random"):
        found.comparisons(to="four")
    with pytest.raises(InputError, match="a metric is one of"):
        found.comparisons(metrics=["mrr"])


def test_prompts_about_one_fact_can_be_drawn_together():
    values = np.random.default_rng(0).normal(size=12).repeat(6)
    found = made({"one": values}, facts=[k // 6 for k in range(72)])
    alone, together = (
        found.summary(by=by).query("knowledge_type == 'all' and metric == 'prob'")
        for by in ("prompt", "fact")
    )
    width = [(each["after_high"] - each["after_low"]).item() for each in (alone, together)]
    assert width[1] > 1.8 * width[0]
    assert alone["after"].item() == together["after"].item()


def test_the_rankings_are_the_neurons_that_were_zeroed_best_first(tmp_path):
    model = bundled_model()
    prompts = load_prompts("color")[:4]
    found = evaluate(model, prompts, "a,e", neurons="both", top=(2, 5), filtered=False)
    of_prompt = found.rankings[found.rankings["prompt_id"] == found.prompts["prompt_id"][1]]
    asked = found.prompts.iloc[1]
    result = attribute(model, asked["text"], target=f" {asked['answer'].strip()}", top=5)
    for kind in ("ffn", "attn"):
        ours = of_prompt[(of_prompt["method"] == "log_prob_increase") & (of_prompt["kind"] == kind)]
        wanted = result.neurons(kind, by_source=False)
        names = ["rank", "layer", "head", "index"]
        assert ours[names].reset_index(drop=True).equals(wanted[names].astype(ours[names].dtypes))
        assert ours["score"].tolist() == pytest.approx(wanted["score"].tolist(), rel=1e-4)
    sums = of_prompt.groupby("method")["score"].sum()
    predicted = found.predicted[found.predicted["top"] == 5].set_index(["prompt_id", "method"])
    for method, total in sums.items():
        zeroed = predicted.loc[(asked["prompt_id"], method), "predicted"]
        assert -total == pytest.approx(zeroed, rel=1e-6)
    found.save(tmp_path)
    pd.testing.assert_frame_equal(load_evaluation(tmp_path).rankings, found.rankings)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "curves.parquet"), found.curves())
    (tmp_path / "rankings.parquet").unlink()  # as an older version saved it
    assert load_evaluation(tmp_path).rankings.empty


# --- files ------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from tl_neuron_attr import load_model
from tl_neuron_attr.evaluate import evaluate
from tl_neuron_attr.knowledge import load_prompts
evaluate(
    load_model("tiny-facts"), load_prompts("color")[:10], "a,e", top=(3, 10), limit=8, seed=1
).save(sys.argv[1])
"""


def evaluated(directory):
    """What the program saved from this process, and the names of its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(directory)])
        exec(PROGRAM, {})
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "two")])
    files = evaluated(tmp_path / "one")
    assert other.wait(timeout=240) == 0
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_is_saved_comes_back_and_is_saved_again_with_the_same_bytes(tmp_path):
    files = evaluated(tmp_path / "one")
    assert {"effects.parquet", "summary.parquet", "summary.csv", "evaluation.json"} <= set(files)
    back = load_evaluation(tmp_path / "one")
    assert [*back.effects.columns] == [*EFFECT_COLUMNS]
    assert back.effects["metric"].unique().tolist() == [*METRICS]
    summary = pd.read_parquet(tmp_path / "one" / "summary.parquet")
    pd.testing.assert_frame_equal(back.summary(), summary)
    facts = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert facts["seed"] == 1 and facts["controls"]["beside"] == "log_prob_increase"
    assert len(facts["model"]["sha256"]) == 64 and facts["prompts"]["measured"] == 8
    back.save(tmp_path / "three")
    for name in files:
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    # a file whose columns are sound, while what pandas notes of them is not
    effects = tmp_path / "one" / "effects.parquet"
    table = pq.read_table(effects)
    noted = table.schema.metadata[b"pandas"].replace(b'"name"', b'"nane"')
    pq.write_table(table.replace_schema_metadata({b"pandas": noted}), effects)
    with pytest.raises(InputError, match="effects.parquet is damaged: KeyError"):
        load_evaluation(tmp_path / "one")
    effects.unlink()
    with pytest.raises(InputError, match="there is no whole evaluation"):
        load_evaluation(tmp_path / "one")


# --- requests that are wrong ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(methods="a,z"), "there is no method 'z'"),
        (dict(methods=[]), "give at least one method"),
        (dict(methods="a,log_prob_increase"), "two methods are called 'log_prob_increase'"),
        (dict(methods="a,random"), "'random' is a control, which is always there"),
        (dict(neurons="heads"), "neurons must be ffn, attn or both"),
        (dict(neurons=["ffn", "ffn"]), "each once"),
        (dict(neurons=[]), "neurons must be"),
        (dict(top=0), "a number of neurons must be at least 1"),
        (dict(top=[]), "top must be one or several"),
        (dict(top=[3, 3]), "different numbers"),
        (dict(top=121), "top is 121, but the model has 120 ffn neurons"),
        (dict(top=73, neurons="attn"), "the model has 72 attn neurons"),
        (dict(limit=0), "limit must be at least 1"),
        (dict(seed=True), "seed must be an integer"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(budget=10), "budget of 10 bytes is too small"),
        (dict(prompts="capitals"), "no prompts called 'capitals'"),
    ],
)
def test_a_wrong_request_is_refused_before_the_model_runs(monkeypatch, arguments, message):
    model = own_bridge_of("phi3")
    asked = known(model)
    passes = count_forward_passes(model, monkeypatch)
    arguments = {"prompts": asked, "methods": "a", **arguments}
    with pytest.raises(InputError, match=message):
        evaluate(model, **arguments)
    assert passes == []


def test_controls_that_cannot_be_as_large_are_told(tiny_gpt2):
    def first_layer(case, kind, top):
        scores = torch.zeros(3, 96)
        scores[0] = 1.0
        return scores

    with pytest.warns(UserWarning, match="6 controls are smaller than what they stand beside"):
        found = evaluate(tiny_gpt2, known(tiny_gpt2), [first_layer], top=(10, 60))
    assert found.facts["controls"]["smaller_than_it"] == 6
    assert "smaller" in found.facts["warnings"][0]


def prompt(number, answer, text="The capital of France is", kind="capital"):
    fact = Fact(knowledge_type=kind, relation="r", subject=f"s{number}", answer=answer)
    return KnowledgePrompt(
        prompt_id=f"{kind}/{number}",
        text=text,
        answer=f" {answer}",
        fact=fact,
        phrasing=text,
        held_out=False,
    )


def test_prompts_that_fall_out_are_listed_and_counted():
    model = bundled_model()
    unsure = "number/addition/1 plus 2/h1"
    asked = [
        prompt(0, "Paris"),
        prompt(1, "Unguessable"),
        prompt(2, "Rome", "The capital of Spain is"),
        *(each for each in load_prompts("number") if each.prompt_id == unsure),
    ]
    found = evaluate(model, asked, "d", top=2)
    assert found.prompts["prompt_id"].tolist() == ["capital/0"]
    assert found.skipped["prompt_id"].tolist() == ["capital/1", "capital/2", unsure]
    assert found.skipped["method"].isna().all()
    assert found.skipped["reason"][0].startswith("not one token: ")
    assert "rank 142, not among the top 10" in found.skipped["reason"][1]
    assert "another answer of its type above" in found.skipped["reason"][2]
    assert found.facts["prompts"]["dropped"] == 3
    unfiltered = evaluate(model, asked, "d", top=2, filtered=False)
    assert unfiltered.prompts["prompt_id"].tolist() == ["capital/0", "capital/2", unsure]


def test_a_set_without_survivors_and_doubled_ids_are_refused_and_one_answer_is_told():
    model = bundled_model()
    with pytest.raises(InputError, match="no prompt remains: 0 of 1 prompts kept"):
        evaluate(model, [prompt(0, "Unguessable")], "d")
    with pytest.raises(InputError, match="two prompts have the prompt_id 'capital/0'"):
        evaluate(model, [prompt(0, "Paris"), prompt(0, "Paris")], "d")
    with pytest.warns(UserWarning, match="'own' only one answer"):
        found = evaluate(model, [prompt(0, "Paris", kind="own")], "d", top=1)
    assert "'own'" in found.facts["warnings"][0]


# --- what must hold ---------------------------------------------------------------------------


def test_on_the_bundled_model_the_method_beats_norm_and_both_controls():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at 100 some controls are smaller than the method's choice
        prompts = [each for each in load_prompts("paper") if each.fact.trained][::60]
        found = evaluate(bundled_model(), prompts, "a,norm", top=(10, 100))
    table = found.summary()
    rows = table[(table["knowledge_type"] == "all") & (table["metric"] == "prob")]
    at_100 = rows[rows["top"] == 100].set_index("method")
    assert min(at_100["prompts"]) >= 24
    for other in ("norm", "random", "norm_matched"):
        assert at_100["after_high"]["log_prob_increase"] < at_100["after_low"][other]
    compared = found.comparisons(to="log_prob_increase", metrics=["prob"])
    assert (compared.loc[compared["top"] == 100, "q"] < 0.01).all()
