"""The doctor: sound models have a clean card, every check can fail, nothing unseen is fine."""

import dataclasses
import importlib
import json
import math
import re
from contextlib import contextmanager

import doctor_table
import pytest
import torch
from conftest import (
    REFUSED,
    SINCE_4,
    SUPPORTED,
    TOKENS,
    HookedTransformer,
    bridge_from,
    bridge_of,
    hooked_of,
    needs_hooked_transformer,
    own_bridge_of,
)
from family_table import NAMES
from transformers import GPT2Config
from typer.testing import CliRunner

from tl_neuron_attr import (
    HOST_CHECKS,
    Attribution,
    ConformanceError,
    InputError,
    UnsupportedModelError,
    check_host,
    check_model,
    cli,
    load_model,
)
from tl_neuron_attr.doctor import check as check_module
from tl_neuron_attr.doctor import checks as module
from tl_neuron_attr.doctor import subject, worst
from tl_neuron_attr.doctor.card import card_lines
from tl_neuron_attr.doctor.findings import Finding
from tl_neuron_attr.doctor.subject import default_prompt, examine
from tl_neuron_attr.host import open_host
from tl_neuron_attr.prompts import Prompt
from tl_neuron_attr.state import changed, model_state, random_states, torch_modes, weights_digest

command = importlib.import_module("tl_neuron_attr.cli.doctor")


@pytest.fixture(scope="module")
def bundled():
    return load_model()


@pytest.fixture(scope="module")
def card(bundled):
    before = model_state(bundled), torch_modes(), random_states()
    digest = weights_digest(bundled)
    found = check_model(bundled)
    after = model_state(bundled), torch_modes(), random_states()
    assert [changed(*pair) for pair in zip(before, after, strict=True)] == [()] * 3
    assert weights_digest(bundled) == digest
    return found


def finding(check, name):
    (found,) = [each for each in check.findings if each.name == name]
    return found


# --- whole models -----------------------------------------------------------------------------


def test_the_bundled_model_has_a_clean_card(card):
    assert card.holds
    assert {each.status for each in card.findings} == {"ok", "not checked"}
    assert card.why_no_double == ""
    measured = [each for each in card.findings if each.error is not None]
    assert len(measured) >= 20
    for each in measured:
        assert each.error <= each.tolerance
        if each.double_error is not None:
            assert each.double_error <= each.double_tolerance <= 1e-6
    # of a family that computes in double throughout: 1e4 times closer than in float32
    for name in ("the FFN neurons", "the attention neurons", "the sum of the layers"):
        assert finding(card, name).double_error < 1e-12
        assert finding(card, name).double_tolerance == 1e-8


def test_nothing_is_called_fine_that_nobody_looked_at(card):
    """A line without a number is a fact that was read off, and these are all there are."""
    said = {each.name for each in card.findings if each.status == "ok" and each.error is None}
    assert said == {"the model afterwards", "the weights", "prompts as text", "certified bounds"}
    unseen = {each.name for each in card.findings if each.status == "not checked"}
    assert unseen == {"other prompts", "the projection index"}
    assert "6 tokens" in finding(card, "other prompts").says


def test_without_room_for_a_copy_float64_is_not_checked(tiny_gpt2):
    found = check_model(tiny_gpt2, TOKENS, copy_limit=1000)
    assert found.holds
    assert "KiB, and 0.977 KiB are allowed" in found.why_no_double
    assert all(each.double_error is None for each in found.findings)
    assert "not checked" in found.about()["float64"]
    assert finding(found, "the forward pass").status == "not checked"


def test_a_copy_that_cannot_be_made_is_no_failure_of_the_model(tiny_gpt2, monkeypatch):
    def no_copies(model):
        raise TypeError("cannot copy this\nlong story")

    monkeypatch.setattr(subject.copy, "deepcopy", no_copies)
    found = check_model(tiny_gpt2, TOKENS)
    assert found.why_no_double == "a copy in float64 does not run (TypeError: cannot copy this)"
    assert found.holds and all(each.double_error is None for each in found.findings)


def test_token_ids_and_a_full_context_leave_something_unchecked(tiny_gpt2, bundled):
    found = check_model(tiny_gpt2, [5] * 32)
    assert "no room for padding" in finding(found, "left padding").says
    by_ids = check_model(bundled, TOKENS, copy_limit=1000)
    assert finding(by_ids, "prompts as text").status == "not checked"


def test_where_the_plan_knows_no_costs_the_rest_is_on_the_card(tiny_gpt2, monkeypatch):
    def unknown(*arguments, **options):
        raise UnsupportedModelError("not known to the plan")

    monkeypatch.setattr(check_module, "plan", unknown)
    found = check_model(tiny_gpt2, TOKENS, copy_limit=1000)
    assert found.holds and finding(found, "the FFN neurons").status == "ok"


def test_half_precision_and_folded_value_biases_are_approximate():
    found = check_model(bridge_of("gpt2", processed=True, dtype=torch.bfloat16), TOKENS)
    assert found.holds
    assert finding(found, "the weights").status == "approximate"
    line = finding(found, "the forward pass")
    assert line.status == "approximate"
    assert 1e-5 < line.error < 0.1
    assert finding(found, "the FFN neurons").tolerance == 2e-2
    assert finding(found, "the FFN neurons").double_error < 1e-12  # of the copy, which is no half


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_half_precision_alone_hides_no_large_error_and_is_called_approximate(dtype, allowed):
    model = own_bridge_of("gpt2", dtype=dtype)
    found = check_model(model, TOKENS, copy_limit=0)
    assert found.holds
    line = finding(found, "the FFN neurons")
    assert line.status == "approximate" and "as far as half precision shows" in line.says
    assert finding(found, "a second time").status == "ok"  # to the last bit
    assert finding(found, "bounds on FFN scores").status == "ok"  # of scores in float32
    assert "rounding in half precision may hide errors" in str(found).replace("\n         ", " ")
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda value, hook: value * 1.05)
    wrong = finding(check_model(model, TOKENS, copy_limit=0), "the FFN neurons")
    assert (wrong.status, wrong.tolerance) == ("fails", allowed)


@pytest.mark.changes("the weights", "the bytes of the weights")
@pytest.mark.parametrize(("logits", "apart"), [(46, 0.25), (160, 1.0)])
def test_large_logits_are_as_far_apart_as_half_precision_has_them(logits, apart):
    """GPT-2's may all be near -100: rounded they are further apart than is allowed elsewhere."""
    model = load_model(dtype="bfloat16")
    at_end = examine(model, None, 0).own.captured.resid_final
    norm = model.original_model.transformer.ln_f
    read = torch.nn.functional.layer_norm(
        at_end, at_end.shape, norm.weight.to(at_end), norm.bias.to(at_end)
    )
    with torch.no_grad():  # the unembedding, which is the embedding
        weight = model.original_model.lm_head.weight
        weight += (logits * read / read.square().sum()).to(weight)
    found = check_model(model, "The capital of France is", copy_limit=0)
    largest = examine(model, None, 0).own.captured.logits.max()
    assert largest / 2 < 128 * apart <= largest
    assert found.holds, found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", list(SUPPORTED))
def test_every_family_holds_in_half_precision_alone(family, dtype):
    # TransformerLens 3.9 folds some families into weights of two dtypes, which do not run
    for processed in (False, True) if SINCE_4 else (False,):
        found = check_model(bridge_of(family, dtype=dtype, processed=processed), copy_limit=0)
        assert found.holds, found


def test_a_model_in_float64_is_its_own_measure():
    found = check_model(bridge_of("gpt2", dtype=torch.float64), TOKENS)
    assert found.holds
    assert finding(found, "the FFN neurons").tolerance == 1e-8
    assert "in float64 itself" in found.why_no_double
    # refused on purpose, for Hugging Face would give NaN
    assert finding(found, "left padding").status == "refused"


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_hooked_transformer_has_a_clean_card(family, capsys):
    found = check_model(hooked_of(family, processed=True), TOKENS)
    assert found.holds
    assert found.class_name == "HookedTransformer"
    assert found.why_no_double == ""
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", list(REFUSED))
def test_a_refused_family_has_a_card_with_the_reason(family):
    class_name, _, reason = REFUSED[family]
    found = check_model(bridge_of(family))
    assert not found.holds
    (line,) = found.findings
    assert line.status == "refused"
    assert reason in line.says
    assert class_name in str(found)
    with pytest.raises(UnsupportedModelError, match=reason):
        check_host(bridge_of(family))


# --- every check can fail ---------------------------------------------------------------------


def hooked(name, edit):
    """Examined with a hook of the user's on the model."""

    def sabotage(model, monkeypatch):
        model.hook_dict[name].add_hook(lambda value, hook: edit(value))
        return examine(model, Prompt(tokens=TOKENS))

    return sabotage


def attributed(change):
    """Examined, and then another result taken for the model's own."""

    def sabotage(model, monkeypatch):
        examined = examine(model, Prompt(tokens=TOKENS))
        result = examined.own.attributed
        vars(examined.own)["attributed"] = dataclasses.replace(result, **change(result))
        return examined

    return sabotage


def patched(name, change):
    """Examined by a check whose own tools lie."""

    def sabotage(model, monkeypatch):
        monkeypatch.setattr(module, name, change(getattr(module, name)))
        return examine(model, Prompt(tokens=TOKENS))

    return sabotage


def drawing(ranked):
    def draws(*arguments, **options):
        torch.rand(1)
        return ranked(*arguments, **options)

    return draws


def leaving_a_hook(ranked):
    def leaves(model, *arguments, **options):
        model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda value, hook: None)
        return ranked(model, *arguments, **options)

    return leaves


def other_scores(result):
    scores = result.layer_scores
    return {"layer_scores": dataclasses.replace(scores, ffn=scores.ffn * 1.01)}


def worse_neurons(result):
    ranked = result.ffn_neurons
    return {"ffn_neurons": ranked.at(torch.arange(5, len(ranked)))}


def other_logits(model, monkeypatch):
    examined = examine(model, Prompt(tokens=TOKENS))
    double = examined.double
    captured = dataclasses.replace(double.captured, logits=double.captured.logits * 1.5)
    return dataclasses.replace(examined, double=dataclasses.replace(double, captured=captured))


def other_query_scores(model, monkeypatch):
    real = Attribution.query_scores

    def without_biases(self, *arguments, **options):
        found = real(self, *arguments, **options)
        return dataclasses.replace(found, bias=found.bias * 0)

    monkeypatch.setattr(Attribution, "query_scores", without_biases)
    return examine(model, Prompt(tokens=TOKENS))


def padded_wrongly(capture_all):
    def wrong(host, prompts, **options):
        captures = capture_all(host, prompts, **options)
        return [dataclasses.replace(run, resid_final=run.resid_final * 1.1) for run in captures]

    return wrong


FAILING = {
    "check_left_alone": [
        (patched("ranked", drawing), "an attribution changes torch's random numbers"),
        (patched("ranked", leaving_a_hook), "an attribution changes the hooks"),
    ],
    "check_identities": [
        (
            hooked("blocks.1.hook_mlp_out", lambda v: v * 1.5),
            r"FFN neurons.* off by 0.33 at layer 1",
        ),
        (hooked("blocks.2.hook_attn_out", lambda v: v + 1), "attention neurons.* at layer 2"),
        (hooked("unembed.hook_out", lambda v: v.clamp(max=0.1)), "the read-out"),
    ],
    # what follows the edit is consistent with it: only what comes before tells
    "check_subkeys": [(hooked("blocks.1.mlp.hook_pre", lambda v: v + 1), "the pre of FFN neurons")],
    "check_prediction": [
        (attributed(lambda found: {"log_prob": found.log_prob + 0.01}), "log p of the answer"),
    ],
    "check_layers": [(attributed(other_scores), "sum of rises")],
    "check_bounds": [
        (
            patched(
                "score_bounds",
                lambda real: lambda *arguments: (real(*arguments)[0] - 1e-3, 0.0),
            ),
            "bounds on FFN scores",
        ),
        (attributed(worse_neurons), "the best FFN neurons"),
    ],
    "check_query_scores": [
        (other_query_scores, "value neurons' scores is off"),
    ],
    "check_zeroing": [
        (
            patched(
                "capture_zeroed",
                lambda real: lambda host, prompts, zeroed: module.capture_all(host, prompts),
            ),
            "the end, which does not move",
        ),
    ],
    "check_batches": [(attributed(other_scores), "in a batch")],
    "check_left_padding": [(patched("capture_all", padded_wrongly), "padded on the left")],
    "check_cache": [(attributed(other_scores), "from run_with_cache")],
    "check_again": [(attributed(other_scores), "a second time")],
    "check_precision": [(other_logits, "the forward pass")],
}
# they say what is so
NEVER_FAILING = {"check_weights", "check_text", "check_limits", "check_router"}


@pytest.mark.parametrize(
    ("name", "sabotage", "says"),
    [(name, *each) for name, cases in FAILING.items() for each in cases],
)
def test_every_check_can_fail(name, sabotage, says, monkeypatch):
    examined = sabotage(own_bridge_of("gpt2"), monkeypatch)
    with torch.random.fork_rng():
        found = getattr(module, name)(examined)
    failed = [each for each in found if each.status == "fails"]
    assert any(re.search(says, f"{each.name}: {each.says}") for each in failed), found
    assert worst(found) == "fails"


def test_of_no_check_is_it_unknown_whether_it_can_fail():
    names = [check.__name__ for check in HOST_CHECKS]
    assert set(FAILING) | NEVER_FAILING == set(names)
    assert len(names) == len(set(names))
    assert not set(FAILING) & NEVER_FAILING


def test_where_an_identity_fails_scores_are_not_checked_rather_than_fine():
    model = own_bridge_of("gpt2")
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda value, hook: value * 1.5)
    found = check_model(model, TOKENS)
    assert not found.holds
    assert found.verdict.startswith("Do not trust its scores")
    assert finding(found, "the FFN neurons").status == "fails"
    assert finding(found, "bounds").status == "not checked"
    assert finding(found, "hooks on the model").status == "approximate"
    assert "0.33 at layer 1" in str(found)
    with pytest.raises(ConformanceError, match="GPT2LMHeadModel: the FFN neurons: .* off by 0.33"):
        check_host(model, prompt=TOKENS)


def test_an_identity_that_fails_in_one_check_alone_fails_there(monkeypatch):
    model = own_bridge_of("gpt2")
    real = model.run_with_cache

    def other_neurons(*arguments, **options):
        logits, cache = real(*arguments, **options)
        name = "blocks.1.mlp.hook_post"
        cache.cache_dict[name] = cache[name] * 1.1
        return logits, cache

    monkeypatch.setattr(model, "run_with_cache", other_neurons)
    found = check_model(model, TOKENS, copy_limit=0)
    assert not found.holds
    line = finding(found, "cache")
    assert line.status == "fails" and "the FFN neurons fails at layer 1" in line.says
    for checks in (HOST_CHECKS, module.check_cache):
        with pytest.raises(ConformanceError, match="cache: .*the FFN neurons fails at layer 1"):
            check_host(model, checks, prompt=TOKENS)


def test_a_check_whose_identities_are_not_looked_at_beside_it_fails_with_them():
    model = own_bridge_of("gpt2")
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda value, hook: value * 1.5)
    with pytest.raises(ConformanceError, match="layers: .*the FFN neurons fails at layer 1"):
        check_host(model, module.check_layers, prompt=TOKENS)


@contextmanager
def chosen(precision):
    """What a user may have set for work of his own."""
    before = torch.get_float32_matmul_precision()
    if precision == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["autocast", "medium"])
def test_a_sound_model_holds_whatever_precision_its_user_chose(precision):
    model = bridge_of("gpt2")
    with chosen(precision):
        found = check_model(model, TOKENS)
        check_host(model, prompt=TOKENS)
    assert found.holds
    assert finding(found, "the precision you set").status == "not checked"


def test_a_precision_that_is_not_left_as_the_user_chose_it_is_found(monkeypatch, tiny_gpt2):
    real = module.ranked

    def resets(*arguments, **options):
        torch.set_float32_matmul_precision("highest")
        return real(*arguments, **options)

    monkeypatch.setattr(module, "ranked", resets)
    with (
        chosen("medium"),
        pytest.raises(ConformanceError, match="changes the precision of float32 products"),
    ):
        check_host(tiny_gpt2, module.check_left_alone, prompt=TOKENS)


@pytest.mark.parametrize("convention", ["exact", "published"])
def test_bounds_that_do_not_hold_certify_nothing(convention, monkeypatch):
    real = module.score_bounds

    def too_low(blocks, out, before):
        bounds, slack = real(blocks, out, before)
        wrong = (out.bias is None) == (convention == "published")
        return bounds - 1e-3 * wrong, slack

    monkeypatch.setattr(module, "score_bounds", too_low)
    found = {each.name: each for each in module.check_bounds(examined_gpt2())}
    assert found["bounds on FFN scores"].status == "fails"
    assert f", {convention}" in found["bounds on FFN scores"].says
    assert found["certified bounds"].status == "fails"
    assert "bounds on FFN scores, bounds on attention scores" in found["certified bounds"].says


def examined_gpt2():
    return examine(bridge_of("gpt2"), Prompt(tokens=TOKENS), 0)


def test_where_nothing_scores_nothing_is_called_fine():
    model = own_bridge_of("gpt2")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    found = check_model(model, TOKENS)
    assert "nan" not in str(found)
    assert finding(found, "padded on the left").error == 0
    unseen = ("bounds on FFN scores", "certified bounds", "zeroing an attention neuron")
    assert {finding(found, name).status for name in unseen} == {"not checked"}


def test_a_model_that_raises_or_gives_nan_has_a_line_for_it(monkeypatch):
    model = own_bridge_of("gpt2")
    with torch.no_grad():
        model.blocks[1].mlp.W_out[0, 0] = math.nan
    found = check_model(model, TOKENS)
    assert "not finite" in found.findings[0].says and not found.holds
    model = own_bridge_of("gpt2")
    monkeypatch.setattr(model, "run_with_hooks", lambda *_, **__: {}["absent"])
    found = check_model(model, TOKENS)
    assert (found.findings[0].status, found.holds) == ("fails", False)
    assert "raises KeyError: 'absent'" in found.findings[0].says
    with pytest.raises(ConformanceError, match="raises KeyError"):
        check_host(model, prompt=TOKENS)


def test_a_check_that_raises_is_a_failure_of_its_own(monkeypatch, tiny_gpt2):
    def broken(host, captured):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(module, "subkey_identities", broken)
    with pytest.raises(ConformanceError, match="subkeys: raises RuntimeError: no such kernel"):
        check_host(tiny_gpt2, [module.check_subkeys], prompt=TOKENS)


def test_what_is_no_model_is_an_input_error():
    for check in (check_model, check_host):
        with pytest.raises(InputError, match="expected a TransformerBridge"):
            check(torch.nn.Identity())
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        check_model(bridge_of("gpt2"), [1000])


def test_the_checks_go_one_by_one_into_anybodys_tests(tiny_gpt2):
    for check in HOST_CHECKS[:2]:
        check_host(tiny_gpt2, [check], prompt=TOKENS)
        check_host(tiny_gpt2, check, prompt=TOKENS)


@pytest.mark.parametrize(
    ("checks", "says"), [([], "there are no checks"), (["x"], "got 'x'"), (3, "got 3")]
)
def test_what_are_no_checks_is_an_input_error(tiny_gpt2, unchecked, checks, says):
    with pytest.raises(InputError, match=says):
        check_host(tiny_gpt2, checks, prompt=TOKENS)


@pytest.mark.changes("the flags of its configuration")
def test_a_model_that_cannot_be_asked_the_default_sentence_is_asked_by_ids(bundled):
    short = own_bridge_of("gpt2")
    short.tokenizer = bundled.tokenizer
    found = check_model(short, copy_limit=0)
    assert found.holds and found.n_tokens == 8
    line = finding(found, "prompts as text")
    assert line.status == "refused"
    assert re.search("'The capital of France is' cannot be asked: token id .* outside", line.says)
    assert line.says.endswith("it was asked by token ids")
    short.tokenizer = None
    short.cfg.n_ctx = 4
    assert check_model(short, copy_limit=0).n_tokens == 4


def test_a_context_shorter_than_the_default_sentence_is_no_error_of_the_users():
    model = load_model()
    model.cfg.n_ctx = 4
    found = check_model(model, copy_limit=0)
    assert found.n_tokens == 4
    assert "cannot be asked: the prompt is 6 tokens" in finding(found, "prompts as text").says


def test_ids_in_place_of_the_default_sentence_are_known_to_model_and_tokenizer(bundled):
    host = dataclasses.replace(open_host(bundled), n_ctx=4, d_vocab=3000)
    assert max(default_prompt(host).tokens) < 2048
    few = dataclasses.replace(host, d_vocab=5)
    assert max(default_prompt(few).tokens) < 5


def test_the_card_counts_one_of_a_kind_as_one():
    config = GPT2Config(vocab_size=61, n_embd=24, n_head=1, n_layer=1, n_positions=32, n_ctx=32)
    found = check_model(bridge_from("GPT2LMHeadModel", config), [3], copy_limit=0)
    assert found.shape.startswith("1 layer, 1 head of 24, ")
    assert "; 1 token, measured" in found.memory
    assert "one prompt of 1 token, read" in finding(found, "other prompts").says
    assert found.holds


def test_the_worst_status_speaks_for_all():
    def of(*statuses):
        return worst([Finding(name="", status=status, says="") for status in statuses])

    assert of("ok", "fails", "refused") == "fails"
    assert of("ok", "approximate", "not checked") == "approximate"
    assert of("ok", "ok") == "ok"
    assert of() == "not checked"


# --- the card ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [58, 80, 100])
def test_no_line_of_the_card_is_too_long(card, width):
    assert max(len(each.text) for each in card_lines(card, width)) <= width
    assert any("allowed" in each.text for each in card_lines(card, width)) == (width >= 80)
    assert all(line == line.rstrip() for line in str(card).splitlines())


def test_the_card_goes_through_json_with_its_numbers(card):
    facts = json.loads(json.dumps(card.to_dict(), allow_nan=False))
    assert facts["holds"] is True
    assert len(facts["findings"]) == len(card.findings)
    assert facts["findings"][1]["error"] == card.findings[1].error
    assert facts["certified"]["peak_bytes"] == card.plan.certified.peak_bytes
    lost = dataclasses.replace(card.findings[1], error=math.nan)
    assert lost.to_dict()["error"] is None


def test_a_notebook_shows_the_card_without_markup_of_the_models(card):
    hostile = dataclasses.replace(
        card,
        model_name="<script>alert(1)</script>",
        findings=(dataclasses.replace(card.findings[0], says='"><img src=x onerror=alert(2)>'),),
    )
    html = hostile._repr_html_()
    assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;" in html


# --- the command ------------------------------------------------------------------------------


def run(*arguments, width=80):
    return CliRunner().invoke(cli.app, ["doctor", *arguments], env={"COLUMNS": str(width)})


def test_the_command_shows_writes_and_exits_with_0(tmp_path, bundled, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *_: bundled)
    shown = run("--out", str(tmp_path))
    assert shown.exit_code == 0, shown.output
    assert "All that was checked holds" in shown.output
    assert max(map(len, shown.output.split("\nwrote ")[0].splitlines())) <= 80
    facts = json.loads((tmp_path / "doctor.json").read_text(encoding="utf-8"))
    page = (tmp_path / "doctor.html").read_text(encoding="utf-8")
    assert "<script>" not in page  # nothing is drawn, so nothing draws
    assert facts["holds"] and "the FFN neurons" in page and "://" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doctor.html", "doctor.json"]


def test_the_command_exits_with_1_where_something_fails(monkeypatch):
    model = own_bridge_of("gpt2")
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda value, hook: value * 1.5)
    monkeypatch.setattr(command, "load", lambda *_: model)
    shown = run("--tokens", "3,17,5", "--json")
    assert shown.exit_code == 1
    assert json.loads(shown.output)["holds"] is False
    monkeypatch.setattr(command, "load", lambda *_: bridge_of(next(iter(REFUSED))))
    shown = run()
    assert (shown.exit_code, "It cannot be attributed" in shown.output) == (1, True)


def test_the_command_exits_with_2_where_nothing_was_asked(tmp_path):
    for arguments in (
        ["--model", str(tmp_path / "absent")],
        ["--tokens", "x"],
        ["--tokens", "99999999"],
    ):
        shown = run(*arguments)
        assert shown.exit_code == 2, shown.output
        assert "Error:" in shown.output


def test_the_command_asks_the_default_prompt_as_its_options_want_it(bundled, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *_: bundled)
    asked = []

    def noted(model, prompt, **options):
        asked.append(prompt)
        raise InputError("that will do")

    monkeypatch.setattr(command, "check_model", noted)
    for arguments in ([], ["--no-bos"], ["--position", "2"]):
        run(*arguments)
    text = "The capital of France is"
    assert asked == [None, Prompt(text=text, prepend_bos=False), Prompt(text=text, position=2)]
    monkeypatch.undo()
    monkeypatch.setattr(command, "load", lambda *_: bundled)
    shown = run("--position", "99")
    assert shown.exit_code == 2 and "position 99 is out of range" in shown.output
    monkeypatch.setattr(command, "load", lambda *_: bridge_of(next(iter(REFUSED))))
    assert run("--position", "2").exit_code == 1


@pytest.mark.parametrize("size", ["nan", "inf", "1e300", "-1"])
def test_a_size_that_is_none_is_said_in_one_sentence(size, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("loaded"))
    shown = run("--copy-gib", size)
    assert shown.exit_code == 2
    assert shown.output.startswith("Error: --copy-gib must be a number of GiB")


# --- the table of families --------------------------------------------------------------------


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def assert_the_pages_rows_are(table, count):
    page = doctor_table.table_of(doctor_table.PAGE.read_text(encoding="utf-8"))
    written = {cells(row)[0]: cells(row) for row in page.splitlines()}
    rows = [cells(row) for row in table.splitlines()[2:]]
    assert len(rows) == count
    for row in rows:
        shown = written[row[0]]
        for column, (ours, theirs) in enumerate(zip(row, shown, strict=True)):
            if column in doctor_table.MEASURED and ours[0].isdigit():
                # machines round differently, by less than this
                assert abs(math.log10(float(ours) / float(theirs))) < 1.1, (row, shown)
            else:
                assert ours == theirs, "python tests/doctor_table.py writes the table anew"


def test_the_page_has_every_family_and_says_of_some_what_comes_out():
    page = doctor_table.table_of(doctor_table.PAGE.read_text(encoding="utf-8"))
    families = [*SUPPORTED, *([] if SINCE_4 else ["cohere"])]  # the page is of TransformerLens 4
    assert [cells(row)[0] for row in page.splitlines()[2:]] == [NAMES[each] for each in families]
    checks = doctor_table.checked_families(("gpt2", "gemma2"))
    assert all(check.holds for check in checks.values())
    assert_the_pages_rows_are(doctor_table.doctor_table(checks), len(checks))


@pytest.mark.slow
def test_the_page_says_of_every_family_what_comes_out():
    checks = doctor_table.checked_families()
    assert all(check.holds for check in checks.values())
    assert_the_pages_rows_are(doctor_table.doctor_table(checks), len(SUPPORTED))


@pytest.mark.slow
@pytest.mark.skipif(HookedTransformer is None, reason="removed in TransformerLens 4")
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "neox-parallel", "gptj"])
def test_hooked_transformers_of_the_page_have_clean_cards(family):
    assert check_model(hooked_of(family), TOKENS).holds
