"""Answers of several tokens: scores add up over tokens, and the lists are those of the sums."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import TOKENS, bridge_of, count_forward_passes, hooked_of, needs_hooked_transformer
from hypothesis import given
from hypothesis import strategies as st
from test_topk import build, cases
from typer.testing import CliRunner

from tl_neuron_attr import (
    InputError,
    Prompt,
    Target,
    attribute,
    attribute_answer,
    load_model,
    neuron_scores,
    open_host,
    top_sums,
)
from tl_neuron_attr.cli import app
from tl_neuron_attr.differences import Side
from tl_neuron_attr.sums import with_positions
from tl_neuron_attr.targets import answer_tokens, resolve_target

FRANCE, ANSWER = "The capital of France is", " Paris and Rome"
IDS = (7, 40, 11)


@pytest.fixture(scope="module")
def facts_model():
    return load_model("tiny-facts")


@pytest.fixture(scope="module")
def found(facts_model):
    return attribute_answer(facts_model, FRANCE, ANSWER, top=20)


# --- the sum over tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_every_score_is_the_sum_of_those_of_prompts_that_end_before_each_token(family):
    """By definition: each token asked about after a prompt of its own."""
    model = bridge_of(family)
    together = attribute_answer(model, TOKENS, IDS, top=15)
    alone = [
        attribute(model, (*TOKENS, *IDS[:place]), target=token, top=5)
        for place, token in enumerate(IDS)
    ]
    logits = torch.stack(
        [each.captured.logits.log_softmax(-1)[t] for each, t in zip(alone, IDS, strict=True)]
    )
    assert together.log_prob == pytest.approx(float(logits.sum()), abs=1e-5)
    layers = sum(each.layers()["score"] for each in alone)
    assert together.layers()["score"].to_numpy() == pytest.approx(layers.to_numpy(), abs=1e-5)
    heads = sum(each.heads()["score"] for each in alone)
    assert together.heads()["score"].to_numpy() == pytest.approx(heads.to_numpy(), abs=1e-5)
    if family != "gemma2":  # blocks in a row: layers telescope token by token
        rise = together.log_prob - together.embedding_log_prob
        assert together.layers()["score"].sum() == pytest.approx(rise, abs=1e-4)
    n_pos = alone[-1].attns[0].shape[1]
    for ranked, of_kind in (
        (together.ffn, [each.ffns for each in alone]),
        (together.attn, [[with_positions(b, n_pos) for b in each.attns] for each in alone]),
    ):
        dense = torch.stack(
            [
                torch.cat([neuron_scores(block, each.out, each.target) for block in blocks])
                for each, blocks in zip(alone, of_kind, strict=True)
            ]
        )
        best = dense.sum(0).sort(descending=True).values[:15]
        torch.testing.assert_close(ranked.neurons.score, best, rtol=0, atol=2e-5)
        number = ranked.neurons.layer * of_kind[0][0].n_neurons + ranked.neurons.number
        torch.testing.assert_close(ranked.scores, dense[:, number], rtol=0, atol=2e-5)
        certificate = ranked.neurons.certificate
        assert certificate.holds and certificate.applies and not certificate.linear
        assert certificate.evaluated < certificate.total == dense.shape[1]


@needs_hooked_transformer
def test_both_classes_give_the_same_answer_scores():
    one, other = (
        attribute_answer(model, TOKENS, IDS, top=8)
        for model in (bridge_of("llama"), hooked_of("llama"))
    )
    assert other.log_prob == pytest.approx(one.log_prob, abs=1e-5)
    assert other.neurons()["index"].tolist() == one.neurons()["index"].tolist()
    torch.testing.assert_close(other.attn.scores, one.attn.scores, rtol=0, atol=1e-5)


@given(st.lists(cases, min_size=3, max_size=3), st.integers(1, 15), st.booleans())
def test_the_best_sums_are_those_of_every_neuron_scored_in_every_run(several, top, recomputed):
    """Runs that have nothing in common but the numbers of their neurons."""
    shape = several[0]
    sides, dense = [], []
    for case in several:
        alike = {name: shape[name] for name in ("kind", "d_model", "d_vocab", "centered")}
        out, blocks, target = build({**case, **alike, "scale": min(case["scale"], 1.0)})
        if recomputed:
            out = type(out)(**{**vars(out), "norm_scale": None})
        bases = torch.stack([block.base for block in blocks])
        sides.append(Side(blocks=blocks, out=out, before=out.baseline(bases, target)))
        dense.append(torch.cat([neuron_scores(block, out, target) for block in blocks]))
    told = []
    found = top_sums(sides, top, progress=told.append)
    assert sum(told) == found.neurons.certificate.evaluated
    sums = torch.stack(dense).sum(0)
    best = sums.sort(descending=True).values[: len(found)]
    size = float(torch.stack(dense).abs().max())
    torch.testing.assert_close(found.neurons.score, best, rtol=1e-4, atol=1e-4 + 1e-5 * size)
    assert found.neurons.certificate.holds
    assert found.neurons.certificate.applies == (not recomputed)
    torch.testing.assert_close(found.scores.sum(0), found.neurons.score, rtol=1e-5, atol=1e-4)
    most = found.scores.abs().argmax(0)
    assert torch.equal(found.most_in, most)
    assert torch.equal(found.neurons.coefficient, found.coefficients.gather(0, most[None])[0])


def test_one_token_is_what_attribute_says_of_it(facts_model):
    one = attribute_answer(facts_model, FRANCE, " Paris", top=10)
    plain = attribute(facts_model, FRANCE, target=" Paris", top=10)
    assert one.log_prob == plain.log_prob
    for kind in ("ffn", "attn"):
        wanted = plain.neurons(kind)
        shared = one.neurons(kind)[list(wanted.columns)]
        pd.testing.assert_frame_equal(shared, wanted, rtol=1e-5, atol=1e-6)


def test_the_model_runs_the_prompt_and_its_answer_once(monkeypatch):
    model = bridge_of("gpt2")
    attribute_answer(model, TOKENS, IDS, top=3)  # a model's first prompt is checked besides
    passes = count_forward_passes(model, monkeypatch)
    result = attribute_answer(model, TOKENS, IDS, top=3)
    assert len(passes) == 1
    assert [part.captured.prompt.read_pos for part in result.parts] == [5, 6, 7]


# --- tables -----------------------------------------------------------------------------------


def test_tables_by_token_add_up_to_those_of_the_answer(found):
    for table, keys in ((found.layers, ["layer", "kind"]), (found.heads, ["layer", "head"])):
        summed = table(by_token=True).groupby(keys, sort=False)["score"].sum().to_numpy()
        assert summed == pytest.approx(table()["score"].to_numpy())
    best = found.heads(3)
    assert best["score"].is_monotonic_decreasing and len(best) == 3
    neurons, each = found.neurons(tokens=3), found.neurons(by_token=True)
    assert len(each) == 3 * len(neurons) and neurons["rank"].max() == 20
    totals = each.groupby(["kind", "rank"], sort=False)["score"].sum()
    assert totals.to_numpy() == pytest.approx(each["total"].to_numpy()[::3], abs=1e-6)
    assert neurons["score"].to_numpy() == pytest.approx(each["total"].to_numpy()[::3])
    for row, at in enumerate(neurons["most_at"]):
        own = each.iloc[3 * row : 3 * row + 3]
        assert abs(own["score"].iloc[at]) == abs(own["score"]).max()
        assert own["coefficient"].iloc[at] == neurons["coefficient"].iloc[row]
    assert found.tokens()["token"].tolist() == [" Paris", " and", " Rome"]
    assert math.exp(found.log_prob) == pytest.approx(found.tokens()["prob"].prod())


def test_it_shows_its_tokens_everywhere(found):
    assert repr(found).startswith(
        "Attribution of the answer ·Paris|·and|·Rome after "
        "<|endoftext|>|The|·capital|·of|·France|·is: log p(answer) = -26.63 nats"
    )
    html = found._repr_html_()
    assert "&lt;|endoftext|&gt;|The" in html and "·Paris|·and|·Rome" in html
    with pytest.raises(InputError, match=r"only the best 20 ffn .*attribute_answer\(..., top=21\)"):
        found.neurons("ffn", 21)


# --- what is asked ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer", "words"),
    [
        (TOKENS, [], "the answer is empty"),
        (TOKENS, [3, 61], "answer id 61 is outside the model's vocabulary of 61"),
        (TOKENS, " Paris", "no tokenizer to read the answer with"),
        (TOKENS, [3] * 28, "are 6 and 27 tokens, together longer than the model's context of 32"),
        (Prompt(tokens=TOKENS, target=3), [3], "takes the target's place"),
        (Prompt(tokens=TOKENS, position=2), [3], "leave target, against and position out"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said_before_the_forward_pass(
    tiny_gpt2, monkeypatch, prompt, answer, words
):
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    with pytest.raises(InputError, match=words):
        attribute_answer(tiny_gpt2, prompt, answer)
    assert not passes


def test_a_target_of_several_tokens_says_what_to_call(facts_model):
    host = open_host(facts_model)
    with pytest.raises(InputError, match=r"is 3 tokens .*or call attribute_answer .*: answer\)"):
        resolve_target(host, ANSWER)
    assert answer_tokens(host, ANSWER) == tuple(
        resolve_target(host, text).id for text in (" Paris", " and", " Rome")
    )


def test_an_answer_without_its_space_is_pointed_out(facts_model):
    with pytest.warns(UserWarning, match=r"did you mean ' P'\?"):
        found = attribute_answer(facts_model, "Tim Duncan plays the sport of", "Phoenix", top=1)
    assert found.tokens()["token"].iloc[0] == "P" and found.warnings


# --- to disk and back, and on the command line ------------------------------------------------


def run(*arguments, width=80):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width)})


def test_what_is_saved_comes_back_and_draws_the_same_page(found, tmp_path):
    found.save(tmp_path, report=True)
    page = (tmp_path / "report.html").read_bytes()
    neurons = pd.read_parquet(tmp_path / "neurons.parquet")
    pd.testing.assert_frame_equal(
        neurons[["layer", "index", "score"]], found.neurons()[["layer", "index", "score"]]
    )
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["command"] == "answer" and facts["log_prob"] == found.log_prob
    assert [Target.of_facts(each).text for each in facts["answer_tokens"]] == [
        " Paris",
        " and",
        " Rome",
    ]
    assert run("report", str(tmp_path)).exit_code == 0
    assert (tmp_path / "report.html").read_bytes() == page
    shown = page.decode()
    assert "What gave the answer Paris and Rome" in shown and "·and" in shown
    # another command's files in the same place do not stay beside it
    attribute_of = run("attribute", FRANCE, "--top", "1", "--out", str(tmp_path))
    assert attribute_of.exit_code == 0
    assert not (tmp_path / "neurons_by_token.parquet").exists()


def test_the_command_line_shows_sums_beside_tokens_in_80_columns(tmp_path):
    shown = run("answer", FRANCE, "--answer", ANSWER, "--top", "3")
    assert shown.exit_code == 0, shown.output
    assert "·Paris|·and|·Rome" in shown.stdout and "2:·Rome" in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    asked = ("answer", FRANCE, "--answer", ANSWER, "--top", "3")
    printed = json.loads(run(*asked, "--json", "--out", str(tmp_path / "out")).stdout)
    assert len(printed["neurons"]) == 6 and len(printed["answer_tokens"]) == 3
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["again"] == (
        "tl-neuron-attr answer --answer ' Paris and Rome' --top 3 'The capital of France is'"
    )


def test_the_command_line_says_what_is_missing():
    shown = run("answer", FRANCE)
    assert shown.exit_code == 2 and "give the answer with --answer" in shown.output
    shown = run("attribute", FRANCE, "--target", ANSWER)
    assert shown.exit_code == 2 and "(on the command line: answer)" in " ".join(
        shown.output.split()
    )


# --- slips, and what is no answer -------------------------------------------------------------


def test_an_answer_that_lacks_its_space_is_pointed_out(facts_model):
    with pytest.warns(UserWarning, match="did you mean ' Paris and Rome'"):
        found = attribute_answer(facts_model, FRANCE, "Paris and Rome", top=2)
    assert any("did you mean ' Paris and Rome'" in each for each in found.warnings)
    assert attribute_answer(facts_model, FRANCE, " Paris and Rome", top=2).warnings == ()


def test_a_prompt_that_ends_with_a_space_is_pointed_out_and_saved_as_it_was_given(
    facts_model, tmp_path
):
    with pytest.warns(UserWarning, match="the prompt ends with a space"):
        found = attribute_answer(facts_model, f"{FRANCE} ", " Paris and Rome", top=2)
    found.save(tmp_path)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["prompt"] == f"{FRANCE} " and len(facts["warnings"]) >= 1


@pytest.mark.parametrize("answer", [{5, 6}, b"ab", {5: 1}])
def test_what_has_no_order_is_no_answer(facts_model, answer):
    with pytest.raises(InputError, match="an answer is one text, or its token ids in order"):
        attribute_answer(facts_model, FRANCE, answer)


def test_an_answer_that_is_no_unicode_is_refused(facts_model):
    with pytest.raises(InputError, match="the answer .* is not valid Unicode text"):
        attribute_answer(facts_model, FRANCE, " \udcff")


def test_runs_that_are_not_numbered_alike_are_not_summed(facts_model):
    one, other = (attribute(facts_model, text, top=2) for text in (FRANCE, "The capital is"))
    sides = [
        Side(
            blocks=each.attns,
            out=each.out,
            before=each.out.baseline(torch.stack([b.base for b in each.attns]), each.target),
        )
        for each in (one, other)
    ]
    with pytest.raises(InputError, match="not numbered alike"):
        top_sums(sides, 3)
    with pytest.raises(InputError, match="no run to sum over"):
        top_sums([], 3)
    backwards = replace(sides[0], blocks=sides[0].blocks[::-1])
    with pytest.raises(InputError, match="not numbered alike"):
        top_sums([backwards], 3)
