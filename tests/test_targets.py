"""What may be explained beside one token: accepted answers, whole distributions; slips with spaces.

Scores are held against their definition in float64, bounds and intervals against scores.
"""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import (
    SHARED,
    TOKENS,
    bridge_of,
    count_forward_passes,
    hooked_of,
    needs_hooked_transformer,
)
from hypothesis import given
from hypothesis import strategies as st
from test_intervals import index_of
from test_topk import build, cases
from typer.testing import CliRunner

from tl_neuron_attr import (
    METHODS,
    Case,
    Distribution,
    InputError,
    Prompt,
    Target,
    attribute,
    attribute_all,
    capture,
    check_model,
    compare,
    load_capture,
    load_model,
    load_run,
    mask_curve,
    neuron_card,
    open_host,
    projection_index,
    run_prompts,
    save_capture,
    tokenize,
)
from tl_neuron_attr.cli import app
from tl_neuron_attr.intervals import score_intervals, suppressing_neurons
from tl_neuron_attr.report import redraw_report
from tl_neuron_attr.scores import neuron_scores
from tl_neuron_attr.targets import answer_tokens, resolve_target
from tl_neuron_attr.topk import score_bounds, top_neurons

FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def facts_model():
    return load_model("tiny-facts")


@pytest.fixture(scope="module")
def sentencepiece():
    path = SHARED / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip("no model with a SentencePiece tokenizer in ../shared/models/stories260K")
    return load_model(path)


@pytest.fixture(scope="module")
def gpt2():
    return bridge_of("gpt2")


# --- by definition ----------------------------------------------------------------------------


def value_of(target, logits):
    """What is explained, from all logits, in words of torch."""
    log_p = logits.log_softmax(-1)
    if target.distribution is not None:
        q = target.distribution.probs
        return -torch.nn.functional.kl_div(log_p, q.expand_as(log_p), reduction="none").sum(-1)
    return torch.logsumexp(log_p[..., [answer.id for answer in target.answers]], -1)


def says_of(out):
    """The logits of a residual vector, in float64, from the fields of the read-out alone."""
    W_U, d_model, d_vocab = out.W_U.double(), *out.W_U.shape

    def or_else(tensor, other):
        return other if tensor is None else tensor.double()

    gain, bias = or_else(out.gain, torch.ones(d_model).double()), or_else(out.bias, 0.0)
    b_U = or_else(out.b_U, torch.zeros(d_vocab).double())

    def says(x):
        x = x - x.mean(-1, keepdim=True) if out.centered else x
        logits = (x / out.norm_scale.double() * gain + bias) @ W_U + b_U
        return logits if out.soft_cap is None else out.soft_cap * torch.tanh(logits / out.soft_cap)

    return says


def by_definition(blocks, out, target):
    """Every neuron's score in float64: what is explained with its contribution, and without."""
    says, scores = says_of(out), []
    for block in blocks:
        base, vectors = block.base.double(), block.vectors(torch.arange(block.n_neurons)).double()
        before = value_of(target, says(base))
        scores.append(value_of(target, says(base + vectors)) - before)
    return torch.cat(scores)


def some_target(form, logits, seed=0):
    """A target of a form: two or three accepted answers, or a distribution of its own."""
    generator = torch.Generator().manual_seed(seed)
    d_vocab = logits.shape[-1]
    if form == "distribution":
        probs = torch.randn(d_vocab, generator=generator, dtype=torch.float64).mul(3).softmax(0)
        return Target(int(probs.argmax()), distribution=Distribution(probs))
    ids = torch.randperm(d_vocab, generator=generator)[: min(d_vocab, 2 + seed % 2)].tolist()
    return Target(ids[0], also=tuple(map(Target, ids[1:])))


FORMS = ("answers", "distribution")


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("gpt2", form) for form in FORMS),
        *(("llama", form) for form in FORMS),
        ("phi", "distribution"),  # parallel blocks, and an unembedding with a bias
        ("gemma2", "answers"),
    ],
)
def test_scores_are_those_of_the_definition_and_the_certified_list_is_the_dense_one(family, form):
    model = bridge_of(family)
    asked = {7, 11, 40} if form == "answers" else Distribution()
    result = attribute(model, TOKENS, target=asked, top=12, dtype=torch.float64)
    target, says = result.target, says_of(result.out)
    if form == "distribution":
        assert torch.equal(target.distribution.probs, result.captured.logits.double().softmax(-1))
    run = result.captured.to(torch.float64)
    final, embedding = (value_of(target, says(x)) for x in (run.resid_final, run.resid_pre[0]))
    assert result.log_prob == pytest.approx(float(final), abs=1e-9)
    assert result.embedding_log_prob == pytest.approx(float(embedding), abs=1e-9)
    mid = run.resid_pre if run.resid_mid is None else run.resid_mid
    for name, base, added in (("attn", run.resid_pre, run.attn_out), ("ffn", mid, run.mlp_out)):
        rises = value_of(target, says(base + added)) - value_of(target, says(base))
        torch.testing.assert_close(getattr(result.layer_scores, name), rises, rtol=0, atol=1e-9)
    for ranked, blocks in (
        (result.ffn_neurons, result.ffns),
        (result.attn_neurons, result.attns),
    ):
        dense = by_definition(blocks, result.out, target)
        best = dense.sort(descending=True, stable=True)
        torch.testing.assert_close(ranked.score, best.values[:12], rtol=0, atol=1e-9)
        number = ranked.layer * blocks[0].n_neurons + ranked.number
        assert torch.equal(number, best.indices[:12])
        assert ranked.certificate.holds and not ranked.certificate.linear
        assert ranked.certificate.evaluated < len(dense) / 2
    if not result.host.parallel:
        total = result.layers()["score"].sum()
        # the run itself was in float32
        assert total == pytest.approx(result.log_prob - result.embedding_log_prob, abs=1e-5)


@needs_hooked_transformer
@pytest.mark.parametrize("asked", [{7, 11, 40}, Distribution()], ids=FORMS)
def test_both_classes_give_the_same(asked):
    one, other = (
        attribute(model, TOKENS, target=asked, top=8)
        for model in (bridge_of("gpt2"), hooked_of("gpt2"))
    )
    assert other.target.words == one.target.words
    torch.testing.assert_close(other.head_scores, one.head_scores, rtol=0, atol=1e-5)
    assert other.ffn_neurons.neurons() == one.ffn_neurons.neurons()
    torch.testing.assert_close(other.ffn_neurons.score, one.ffn_neurons.score, rtol=0, atol=1e-5)


def test_under_a_recomputed_norm_accepted_answers_are_scored_one_by_one(gpt2):
    result = attribute(gpt2, TOKENS, target={7, 11}, top=5, convention="recomputed")
    out, block = result.out, result.ffns[1]
    alone = [
        out.log_prob(
            torch.stack([block.base, *block.vectors(torch.arange(3)) + block.base]), Target(token)
        )
        for token in (7, 11)
    ]
    joint = torch.stack(alone).logsumexp(0)
    found = neuron_scores(block, out, result.target)[:3]
    torch.testing.assert_close(found, joint[1:] - joint[0], rtol=0, atol=2e-6)


# --- what holds of every target ---------------------------------------------------------------


def with_target(case, form, dtype=torch.float32, cap=None):
    out, blocks, _ = build(case, dtype)
    if cap is not None:
        out = replace(out, soft_cap=cap)
    return out, blocks, some_target(form, out.b_U, case["seed"])


@given(cases, st.sampled_from([*FORMS, "capped"]), st.integers(1, 17))
def test_a_bound_is_never_below_the_exact_score_and_the_list_is_the_dense_one(case, form, top):
    cap = 2.0 if form == "capped" else None
    out, blocks, target = with_target(case, "answers" if cap else form, cap=cap)
    before = out.baseline(torch.stack([block.base for block in blocks]), target)
    bounds, slack = score_bounds(blocks, out, before)
    exact = torch.cat([neuron_scores(block, out, target) for block in blocks])
    assert (bounds >= exact).all(), (bounds - exact).min()
    wanted = by_definition(blocks, out, target)
    assert (exact.double() - wanted).abs().max() <= slack + (2e-4 if cap else 2e-5)
    found = top_neurons(blocks, out, target, top)
    assert found.certificate.holds
    best = exact.sort(descending=True).values[: len(found)]
    torch.testing.assert_close(found.score, best, rtol=1e-5, atol=1e-5 + slack)


@given(cases, st.sampled_from(FORMS), st.sampled_from([0, None]), st.integers(1, 17))
def test_an_interval_contains_the_score_and_the_lowest_are_those_of_the_dense_list(
    case, form, likely, top
):
    out, blocks, target = with_target({**case, "scale": min(case["scale"], 1.0)}, form)
    index = index_of(blocks, out)
    found = score_intervals(blocks, out, target, index, evaluate=False, likely=likely)
    wanted = by_definition(blocks, out, target).view_as(found.lower)
    assert (found.lower <= wanted + 1e-12).all(), (wanted - found.lower).min()
    assert (found.upper >= wanted - 1e-12).all(), (found.upper - wanted).min()
    lowest = suppressing_neurons(blocks, out, target, index, top)
    assert lowest.certificate.holds
    exact = torch.cat([neuron_scores(block, out, target) for block in blocks])
    wanted, within = exact.sort().values[: len(lowest)], 1e-5 + lowest.certificate.slack
    torch.testing.assert_close(lowest.score, wanted, rtol=1e-5, atol=within)


@given(cases, st.integers(0, 2**31))
def test_one_answer_and_a_certain_distribution_are_that_token(case, seed):
    out, blocks, _ = build(case, torch.float64)
    token = Target(seed % case["d_vocab"])
    certain = torch.zeros(case["d_vocab"], dtype=torch.float64)
    certain[token.id] = 1.0
    sure = Target(token.id, distribution=Distribution(certain))
    for block in blocks:
        wanted = neuron_scores(block, out, token)
        torch.testing.assert_close(neuron_scores(block, out, sure), wanted, rtol=0, atol=1e-9)
    base = blocks[0].base
    torch.testing.assert_close(out.log_prob(base, sure), out.log_prob(base, token))


def test_all_tokens_together_are_accepted_by_every_neuron_alike(gpt2):
    everything = set(range(61))
    result = attribute(gpt2, TOKENS, target=everything, top=5, dtype=torch.float64)
    assert abs(result.log_prob) < 1e-12
    assert result.ffn_neurons.score.abs().max() < 1e-12
    assert abs(result.layers()["score"]).max() < 1e-12


def test_the_rise_of_accepted_answers_lies_between_those_of_each(gpt2):
    together, *each = attribute_all(gpt2, TOKENS, target=[{7, 11}, 7, 11], top=5)
    low, high = (
        torch.stack([result.head_scores for result in each]).amin(0),
        torch.stack([result.head_scores for result in each]).amax(0),
    )
    assert ((together.head_scores >= low - 1e-6) & (together.head_scores <= high + 1e-6)).all()


def test_the_share_of_an_answer_hardly_ever_given_does_not_loosen_the_bound(facts_model):
    """The largest of the answers' bounds would be as true, and leave far more to be scored."""
    result = attribute(facts_model, FRANCE, target={" Paris", " Rome", "x"}, top=100)
    assert result.ffn_neurons.certificate.evaluated <= 110


def test_nothing_differs_where_other_targets_share_the_batch(gpt2):
    asked = [Distribution(), 7, {7, 11}, {3, 9, 40}, None, {9, 12}]
    together = attribute_all(gpt2, [TOKENS] * 5 + [TOKENS[:4]], target=asked, top=6)
    for target, prompt, found in zip(asked, [TOKENS] * 5 + [TOKENS[:4]], together, strict=True):
        alone = attribute(gpt2, prompt, target=target, top=6)
        assert found.log_prob == pytest.approx(alone.log_prob, abs=1e-6)
        assert found.ffn_neurons.neurons() == alone.ffn_neurons.neurons()
        torch.testing.assert_close(found.head_scores, alone.head_scores, rtol=0, atol=1e-6)


# --- what is built on scores ------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{7, 11, 40}, Distribution()], ids=FORMS)
def test_everything_else_takes_them_too(gpt2, asked, tmp_path):
    index = projection_index(gpt2, tmp_path / "index")
    result = attribute(gpt2, TOKENS, target=asked, top=10, index=index)
    target, says = result.target, says_of(result.out)
    dense = by_definition(result.ffns, result.out, target)
    lowest = result.suppressing("ffn", 5)["score"].tolist()
    assert lowest == pytest.approx(dense.sort().values[:5].tolist(), abs=1e-5)
    rise = float(dense.clamp(min=0).sum())
    (low, high), *_ = result.shares(5)[["rise_lower", "rise_upper"]].to_numpy()
    assert low - 1e-6 <= rise <= high + 1e-6
    # the lens ends at the read position's value
    assert result.log_probs()["log_prob"].iloc[-1] == pytest.approx(result.log_prob, abs=1e-5)
    assert result.log_probs()["log_prob"].max() <= 0
    # zeroing a head: by its definition
    scan = result.head_scan()
    other = compare(result, ["L1.H0"], top=10)
    change = other.own_log_prob - result.log_prob
    at = scan[(scan["layer"] == 1) & (scan["head"] == 0)]["change"].item()
    assert at == pytest.approx(change, abs=1e-4)
    differences = dense - by_definition(
        other.sides["ffn"][1].blocks, other.sides["ffn"][1].out, target
    )
    assert other.ffn_neurons.neurons.score.tolist() == pytest.approx(
        differences.sort(descending=True).values[:10].tolist(), abs=1e-5
    )
    # a card, and the prompts where its neuron scores most
    card = neuron_card(result, result.ffn_neurons.neurons()[0], prompts=[result])
    assert card.score == pytest.approx(float(dense.max()), abs=1e-5)
    assert target.words in card.text() and target.words in card.prompts["target"].item()
    assert json.loads(json.dumps(card.to_dict()))["target"] == target.facts()
    assert says(result.captured.resid_final.double()).shape == (61,)
    assert result.query_neurons(5)["score"].notna().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_method_takes_them_or_says_why_not_before_it_runs_anything(gpt2, monkeypatch, form):
    asked = {7, 11, 40} if form == "answers" else Distribution()
    case = Case(result=attribute(gpt2, TOKENS, target=asked, top=5))
    passes = count_forward_passes(gpt2, monkeypatch)
    refused = set()
    for name, method in METHODS.items():
        before = len(passes)
        try:
            scores = method(case, "ffn", None)
        except InputError as error:
            if "corrupted" not in str(error):
                assert case.result.target.words in str(error)
                refused.add(name)
            assert len(passes) == before, name
        else:
            assert scores.isfinite().all()
    assert {"rank", "coefficient_rank", "direct_logit", "curved_gradient"} <= refused
    assert ("prob_increase" in refused) == (form == "distribution")
    assert not {"log_prob_increase", "log_prob", "gradient_activation", "ablation"} & refused


def test_a_curve_of_accepted_answers_has_their_probability_and_the_best_rank(gpt2):
    both, one, other = attribute_all(gpt2, TOKENS, target=[{7, 11}, 7, 11], top=10)
    curves = [mask_curve(each, one.ffn_neurons, tops=[0, 3]) for each in (both, one, other)]
    for row in range(2):
        a, b, c = (curve.iloc[row] for curve in curves)
        assert a["prob"] == pytest.approx(b["prob"] + c["prob"], rel=1e-4)
        assert a["log_prob"] == pytest.approx(math.log(a["prob"]), abs=1e-4)
        assert a["target_rank"] == min(b["target_rank"], c["target_rank"])
    whole = attribute(gpt2, TOKENS, target=Distribution(), top=10)
    with pytest.raises(InputError, match="no rank and no probability"):
        mask_curve(whole, one.ffn_neurons, tops=[0])


# --- what is asked, and how it shows itself ---------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (set(), {}, "no accepted answers"),
        ({"a"}, {}, "no tokenizer to read the target with"),
        ({3, 61}, {}, "target id 61 is outside the model's vocabulary"),
        ([3, 4, 3], {}, "the accepted answer 3 is given twice; give each once"),
        ([" a", " a"], {}, "the accepted answer ' a' is given twice; give each once"),
        ({3, 4}, {"against": 5}, "of one token against another"),
        (Distribution(), {"against": 5}, "of one token against another"),
        (
            Distribution(torch.ones(3) / 3),
            {},
            r"each of the model's 61 tokens; got the shape \[3\]",
        ),
        (Distribution(torch.ones(61)), {}, "sum to 1; these sum to 61"),
        (Distribution(torch.cat([torch.tensor([2.0, -1.0]), torch.zeros(59)])), {}, "least is -1"),
        (Distribution(torch.full((61,), torch.nan)), {}, "must be finite"),
    ],
)
def test_what_is_wrong_with_a_target_is_said_before_the_forward_pass(
    gpt2, monkeypatch, target, options, words
):
    passes = count_forward_passes(gpt2, monkeypatch)
    with pytest.raises(InputError, match=words):
        attribute(gpt2, TOKENS, target=target, **options)
    assert not passes


def test_a_distribution_is_refused_under_a_soft_cap():
    with pytest.raises(InputError, match="soft cap"):
        attribute(bridge_of("gemma2"), TOKENS, target=Distribution())


def test_answers_are_one_target_whatever_their_order_and_form(facts_model):
    host = open_host(facts_model)
    wanted = resolve_target(host, {" Paris", " Rome"})
    assert wanted.words == "·Rome or ·Paris"  # by id
    rome = resolve_target(host, " Rome").id
    for form in ([" Paris", " Rome"], {rome, " Paris"}, frozenset([" Rome", " Paris"])):
        assert resolve_target(host, form) == wanted
    assert resolve_target(host, {" Paris"}) == resolve_target(host, " Paris")
    with pytest.raises(InputError, match="are one token, ' Rome'"):
        resolve_target(host, {" Rome", rome})
    captured = capture(host, tokenize(host, Prompt(text=FRANCE)))
    listed = attribute(facts_model, captured, target=[" Paris", " Rome"], top=1)
    assert listed.target == wanted
    assert Prompt(text=FRANCE, target=[" Paris", " Rome"]).target == {" Paris", " Rome"}


def test_tokens_are_shown_as_the_model_sees_them(facts_model):
    result = attribute(facts_model, FRANCE, target={" Paris", " Rome"}, top=2)
    assert repr(result).startswith(
        "Attribution of ·Rome (id 1034) or ·Paris (id 1058) after "
        "<|endoftext|>|The|·capital|·of|·France|·is: log p(target) = -0.04"
    )
    assert "·Rome" in result._repr_html_() and "1058" in result._repr_html_()
    whole = attribute(facts_model, FRANCE, target=Distribution(), top=2)
    assert "the model&#x27;s own prediction" in whole._repr_html_()
    assert "-KL(target || prediction) = 0 nats" in repr(whole).replace("-0 nats", "0 nats")
    long = attribute(facts_model, [5] * 60, top=1)
    assert "|…|" in repr(long) and len(repr(long)) < 500


def test_a_target_without_its_space_is_pointed_out_and_kept(facts_model):
    sport = "Tim Duncan plays the sport of"
    words = r"'P' has a probability of .* here, ' P' of 0.024: did you mean ' P'\?"
    with pytest.warns(UserWarning, match=words):
        found = attribute(facts_model, sport, target="P", top=1)
    assert found.target.text == "P" and len(found.warnings) == 1
    with pytest.warns(UserWarning, match=words):  # not only of a batch's first prompt
        attribute_all(facts_model, [FRANCE, sport], target=[" Paris", "P"], top=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(facts_model, sport, target=" P", top=1)
        attribute(facts_model, sport, target={"P", " P"}, top=1)
        attribute(facts_model, FRANCE, target=" lin", top=1)  # no better without: both are absurd
    with pytest.warns(UserWarning, match="did you mean ' P'"):
        attribute(facts_model, sport, target=" of", against="P", top=1)


def test_a_prompt_that_ends_with_a_space_is_pointed_out_and_kept(facts_model):
    with pytest.warns(UserWarning, match=r"ends with a space.*did you mean 'The capital of Fr"):
        found = attribute(facts_model, f"{FRANCE} ", top=1)
    assert found.captured.prompt.token_texts[-1] == " "
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(facts_model, f"{FRANCE} ", position=-2, top=1)


def test_a_text_that_is_one_token_with_other_spaces_is_named(facts_model):
    host = open_host(facts_model)
    for text in ("Paris", " Paris ", "Paris "):
        with pytest.raises(InputError, match=r"did you mean ' Paris'\?"):
            resolve_target(host, text)
    with pytest.raises(InputError, match=r"against 'Rome' is .* tokens .*did you mean ' Rome'\?"):
        resolve_target(host, " Paris", "Rome")


# --- to disk and back, and on the command line ------------------------------------------------


@pytest.mark.usefixtures("few_cards")
@pytest.mark.parametrize("form", FORMS)
def test_captures_and_reports_of_them_come_back(facts_model, tmp_path, form):
    host = open_host(facts_model)
    probs = torch.softmax(torch.arange(host.d_vocab).double() / 500, 0)
    asked = {" Paris", " Rome"} if form == "answers" else Distribution(probs, "a slope")
    captured = capture(host, tokenize(host, Prompt(text=FRANCE, target=asked)))
    save_capture(captured, tmp_path / "capture")
    again = load_capture(tmp_path / "capture")
    first, second = (attribute(facts_model, each, top=3) for each in (captured, again))
    assert second.target.words == first.target.words
    assert torch.equal(second.ffn_neurons.score, first.ffn_neurons.score)
    assert second.log_prob == first.log_prob
    first.save(tmp_path / "out", report=True)
    page = (tmp_path / "out" / "report.html").read_bytes()
    assert (tmp_path / "out" / "report.html") == redraw_report(tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_bytes() == page
    assert Target.of_facts(json.loads((tmp_path / "out" / "run.json").read_text())["target"]).words
    shown = page.decode()
    assert ("·Rome</code> or <code>" in shown) == (form == "answers")
    assert ("a slope" in shown) == (form == "distribution")
    assert ("--target-id 1034 --target-id 1058" in shown) == (form == "answers")
    assert ("a figure says log p(target)" in shown) == (form == "distribution")
    assert ("that no command line takes" in shown) == (form == "distribution")


def run_app(*arguments, width=80):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", " Rome", "--target", " Paris"], "·Rome (id 1034) or ·Paris (id 1058)"),
        (["--target-id", "1058", "--target-id", "1034"], "·Rome (id 1034) or ·Paris (id 1058)"),
        (["--distribution"], "the model's own prediction   -KL(target || prediction) = 0.000 nats"),
    ],
)
def test_the_command_line_asks_about_them_and_lines_fit(options, words):
    shown = run_app("attribute", FRANCE, "--top", "2", *options)
    assert shown.exit_code == 0, shown.output
    assert words in shown.stdout.replace("\n", "")
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    found = json.loads(run_app("attribute", FRANCE, "--top", "2", "--json", *options).stdout)
    assert Target.of_facts(found["target"]).words_and_ids in words
    card = run_app("card", "L2.N418", FRANCE, *options)
    assert card.exit_code == 0 and Target.of_facts(found["target"]).words in card.stdout


def test_the_command_line_refuses_what_contradicts_itself():
    for options, words in (
        (["--target", " Rome", "--distribution"], "either --distribution or answers"),
        (["--target", " Rome", "--target", " Rome"], "the same answer twice"),
        (["--position", "6"], "position 6 is out of range: the prompt is 6 tokens (0 to 5"),
        (["--target", " Rome", "--target", " Paris", "--against", " Bern"], "of one token against"),
    ):
        shown = run_app("attribute", FRANCE, *options)
        said = " ".join(shown.output.split())
        assert shown.exit_code == 2 and words in said, shown.output


def test_a_run_says_which_prompts_its_tables_cannot_hold(facts_model, tmp_path):
    file = tmp_path / "asked.jsonl"
    lines = [{"text": FRANCE, "target": [" Paris", " Rome"]}, {"text": FRANCE, "target": " Paris"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    run_prompts(facts_model, str(file), tmp_path / "run", top=3)
    errors = load_run(tmp_path / "run").dataset("errors").to_table().to_pandas()
    assert errors["reason"].tolist() == [
        "a run's tables hold one token as target, not ·Rome or ·Paris; leave the others out, or "
        "attribute the prompt by itself"
    ]
    kept = load_run(tmp_path / "run").prompts()
    assert kept["target"].isna().tolist() == kept["target_text"].isna().tolist() == [True, False]


# --- what a distribution is called, and texts behind others -----------------------------------


def test_the_prediction_of_another_run_is_called_so(facts_model):
    clean = attribute(facts_model, "The capital of France is", target=Distribution(), top=2)
    assert clean.target.distribution.is_own
    other = attribute(
        facts_model, "The capital of Italy is", target=clean.target.distribution, top=2
    )
    assert other.target.distribution.name == "the prediction of another run"
    assert other.log_prob < clean.log_prob - 0.1


def test_a_capture_that_an_earlier_release_would_misread_is_of_a_later_format(
    facts_model, tmp_path
):
    for target, version in ((5, 1), ({5, 6}, 2), (Distribution(), 2)):
        found = attribute(facts_model, TOKENS, target=target, top=2)
        save_capture(found.captured, tmp_path)
        assert json.loads((tmp_path / "capture.json").read_text())["format"] == version


def test_a_distribution_whose_probabilities_are_not_known_is_refused(facts_model):
    with pytest.raises(InputError, match="the probabilities of mine are not known"):
        attribute(facts_model, TOKENS, target=Distribution(name="mine"))


def test_probabilities_may_be_of_numpy_and_nothing_else_passes_for_them(facts_model):
    count = facts_model.cfg.d_vocab
    probs = torch.full((count,), 1 / count, dtype=torch.float64)
    wanted, found = (
        attribute(facts_model, TOKENS, target=Distribution(each), top=2).log_prob
        for each in (probs, probs.numpy())
    )
    assert found == wanted
    with pytest.raises(InputError, match="probabilities are a tensor"):
        attribute(facts_model, TOKENS, target=Distribution("flat"), top=2)


def test_the_doctor_asks_about_one_token(facts_model):
    for target in ({5, 6}, Distribution()):
        with pytest.raises(InputError, match="the doctor asks about one token"):
            check_model(facts_model, Prompt(tokens=TOKENS, target=target))


@pytest.mark.parametrize("answer", [".", ", and", "\n", " time", " 😀", "was"])
def test_a_text_behind_another_has_the_tokens_it_has_there(sentencepiece, answer):
    """SentencePiece puts a space of its own in front of what it reads, but not behind a text."""
    host = open_host(sentencepiece)
    before = host.model.tokenizer("Once", add_special_tokens=False)["input_ids"]
    whole = host.model.tokenizer(f"Once{answer}", add_special_tokens=False)["input_ids"]
    if answer != "was":  # whose own spelling has a space, which is taken as meant
        assert list(answer_tokens(host, answer)) == whole[len(before) :]


def test_a_target_without_a_space_is_one_token_where_sentencepiece_adds_one(sentencepiece):
    found = attribute(sentencepiece, "Once upon a time", target=".", top=2)
    assert found.target.text == "."
