"""In-context heads: M by its definition, a planted head that copies labels, and what it reads."""

import warnings

import pandas as pd
import pytest
import torch
from conftest import (
    FAMILIES,
    bridge_of,
    bundled_model,
    count_forward_passes,
    hooked_of,
    hugging_face_model,
    leaving_the_random_state,
    needs_hooked_transformer,
    own_bridge_of,
)
from oracle import log_prob as oracle_log_prob
from oracle import norm_scale
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_neuron_attr import (
    Head,
    InputError,
    attribute,
    head_inputs,
    head_scan,
    in_context_heads,
)
from tl_neuron_attr.prompts import Prompt

FIRST, SECOND = 30, 31
# x1 b1 x2 b2 x3 b1 b1 ?
FEW_SHOT = (3, FIRST, 17, SECOND, 40, FIRST, FIRST, 22)
PLACES = ((1, 5, 6), (3,))
LABELS = (FIRST, SECOND)
LAST = len(FEW_SHOT) - 1


def attributed(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # folded value biases
        return attribute(model, FEW_SHOT, **{"target": FIRST, "top": 5, **options})


def near(value, tolerance=1e-5):
    return pytest.approx(value, abs=tolerance, rel=tolerance)


# --- by definition ----------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["exact", "published", "recomputed"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel"])
def test_m_is_the_difference_of_two_log_probabilities_of_the_vector_alone(family, convention):
    model = bridge_of(family, dtype=torch.float64)
    result = attributed(model, convention=convention)
    found = in_context_heads(result, LABELS, top=100, scan=False)
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([FEW_SHOT]))
    rms = family == "llama"
    bias = torch.zeros(24) if rms else model.ln_final.bias
    weights = [each.tolist() for each in (model.ln_final.weight, bias, model.W_U.T, model.b_U)]
    options = dict(convention=convention, rms=rms, eps=model.cfg.eps)
    final = cache["blocks.2.hook_resid_post"][0, -1].tolist()
    scale = norm_scale(final, **options)

    def difference(vector):
        vector = vector.tolist()
        both = (oracle_log_prob(weights, vector, token, scale, **options) for token in LABELS)
        return next(both) - next(both)

    assert found.constant == near(difference(torch.zeros(24)), 1e-8)
    # none where there are no biases to bring one
    assert (found.constant == 0) == (convention == "published" or rms)
    n_heads = result.host.n_heads
    positions = found.positions.set_index(["layer", "head", "source_pos"])
    assert len(positions) == 3 * n_heads * 4
    heads = found.heads.set_index(["layer", "head"])
    for layer in range(3):
        base = cache[f"blocks.{layer}.hook_resid_pre"][0, -1]
        for head in range(n_heads):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, head, -1]
            v = cache[f"blocks.{layer}.attn.hook_v"][0]
            v = v[:, head * v.shape[1] // n_heads]
            W_O = model.blocks[layer].attn.W_O[head].detach()
            brought = {}
            for place in (*PLACES[0], *PLACES[1]):
                vector = torch.zeros(24).double()
                for index in range(len(W_O)):
                    vector += pattern[place] * v[place, index] * W_O[index]
                brought[place] = vector
                row = positions.loc[layer, head, place]
                assert row["attention"] == near(float(pattern[place]), 1e-8)
                assert row["label"] == f"<{FEW_SHOT[place]}>"
                assert row["log_prob_difference"] == near(difference(vector), 1e-7)
                rise = difference(base + vector) - difference(base)
                assert row["contrast"] == near(rise, 1e-7)
                if convention != "recomputed":
                    assert row["contrast"] == near(difference(vector) - found.constant, 1e-7)
            row = heads.loc[layer, head]
            for number, places in enumerate(PLACES, start=1):
                together = sum(brought[place] for place in places)
                rise = difference(base + together) - difference(base)
                assert row[f"contrast_{number}"] == near(rise, 1e-7)
                paid = sum(float(pattern[place]) for place in places)
                assert row[f"attention_{number}"] == near(paid, 1e-8)
            whole = (pattern[:, None] * v).sum(0) @ W_O
            assert row["contrast"] == near(difference(base + whole) - difference(base), 1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_have_the_scores_and_the_effects_they_have_elsewhere(family):
    model = bridge_of(family)
    result = attributed(model)
    found = in_context_heads(result, LABELS, top=100)
    wanted = result.heads(top=100)
    for name in ("layer", "head", "score"):
        assert found.heads[name].tolist() == wanted[name].tolist()
    effects = head_scan(result.host, result.captured, result.target)
    zeroed = [float(effects[row.layer, row.head]) for row in found.heads.itertuples()]
    assert found.heads["zeroed"].tolist() == near(zeroed)
    contrast = attributed(model, target=FIRST, against=SECOND).heads()
    contrast = contrast.set_index(["layer", "head"])["score"]
    for row in found.heads.itertuples():
        assert row.contrast == near(contrast[row.layer, row.head])
    short = in_context_heads(result, LABELS, top=3, scan=False)
    assert short.heads["zeroed"].isna().all()
    pd.testing.assert_frame_equal(
        short.heads.drop(columns="zeroed"), found.heads.head(3).drop(columns="zeroed")
    )
    pd.testing.assert_frame_equal(short.positions, found.positions.head(12))
    assert short.positions["source_pos"].tolist() == [1, 3, 5, 6] * 3


def test_exchanging_the_labels_turns_the_signs():
    result = attributed(bridge_of("gpt2"))
    one, other = (in_context_heads(result, labels, scan=False) for labels in (LABELS, LABELS[::-1]))
    assert one.label_positions == other.label_positions[::-1] == PLACES
    assert (one.heads["contrast"] + other.heads["contrast"]).abs().max() < 1e-6
    assert (one.heads["contrast_1"] + other.heads["contrast_2"]).abs().max() < 1e-6
    assert one.heads["attention_1"].tolist() == near(other.heads["attention_2"].tolist())
    difference = one.positions["log_prob_difference"] + other.positions["log_prob_difference"]
    assert difference.abs().max() < 1e-6


# --- what a head reads ------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "olmo2"])
def test_what_a_head_reads_is_the_sum_of_its_parts(family):
    model = bridge_of(family)
    result = attributed(model)
    host = result.host
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([FEW_SHOT]))
    where = [1, 3, LAST]
    for layer in range(3):
        table = head_inputs(result, Head(layer, 1), where, tokens=2)
        assert table["part"].tolist() == ["embed", "attn", "ffn", "bias"] * 3
        assert table["position"].tolist() == [place for place in where for _ in range(4)]
        for place in where:
            rows = table[table["position"] == place].set_index("part")
            at = [cache[f"blocks.{each}.hook_attn_out"][0, place] for each in range(layer)]
            mlp = [cache[f"blocks.{each}.hook_mlp_out"][0, place] for each in range(layer)]
            zero = torch.zeros(24)
            parts = {
                "embed": cache["blocks.0.hook_resid_pre"][0, place],
                "attn": sum(at, zero),
                "ffn": sum(mlp, zero),
            }
            for name, part in parts.items():
                assert rows.loc[name, "norm"] == near(float(part.norm()), 1e-4)
                assert len(rows.loc[name, "raises"]) == (2 if part.any() else 0)
            # through the norm, frozen at the scale of the whole
            x = cache[f"blocks.{layer}.hook_resid_pre"][0, place]
            norm, b_V = host.attn_norm(layer), host.b_V(layer)
            centre = host.norm == "layer_norm"
            variance = (x - x.mean()).square().mean() if centre else x.square().mean()
            read = {}
            for name, part in parts.items():
                if norm.kind == "none":
                    read[name] = part
                    continue
                part = (part - part.mean() if centre else part) / (variance + host.eps).sqrt()
                read[name] = part if norm.gain is None else part * norm.gain
            read["bias"] = zero if norm.bias is None else norm.bias
            total = sum(read.values())
            v = cache[f"blocks.{layer}.attn.hook_v"][0, place]
            W_V = host.W_V(layer)
            group = 1 * len(W_V) // host.n_heads
            v = v[1 * len(v) // host.n_heads]
            for name, part in read.items():
                share = float(part @ total / (total @ total))
                assert rows.loc[name, "share"] == near(share, 1e-3)
                value = part @ W_V[group]
                if name == "bias" and b_V is not None:
                    value = value + b_V[group]
                # against the model's own value vector
                assert rows.loc[name, "value_share"] == near(float(value @ v / (v @ v)), 1e-3)
            assert rows["share"].sum() == near(1)
            assert rows["value_share"].sum() == near(1)


def test_the_read_position_needs_no_other_run(monkeypatch):
    model = own_bridge_of("gpt2")
    result = attributed(model)
    passes = count_forward_passes(model, monkeypatch)
    query = head_inputs(result, "L2.H1")
    assert not passes
    assert query["position"].tolist() == [LAST] * 4
    both = head_inputs(result, "L2.H1", [3, -1, LAST])
    assert len(passes) == 1
    assert both["position"].tolist() == [3] * 4 + [LAST] * 4
    pd.testing.assert_frame_equal(both[4:].reset_index(drop=True), query)
    pd.testing.assert_frame_equal(head_inputs(result, "L2.H1", -1), query)
    in_context_heads(result, LABELS, scan=False)
    assert len(passes) == 1


# --- a planted head ---------------------------------------------------------------------------


@leaving_the_random_state
def planted_model():
    """L1.H2 attends from the last token to labels alone, all alike, and says what they are."""
    class_name, config = FAMILIES["gpt2"]
    hf = hugging_face_model(class_name, config(), scale=0.02)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)))[0]
    basis = basis - basis.mean(1, keepdim=True)  # a LayerNorm sees no mean
    label, ask, one, other, said_one, said_other = basis[:6]
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "bias" in name:
                parameter.zero_()
            elif "ln_" in name:
                parameter.fill_(1.0)
        embed = hf.transformer.wte.weight
        for place, token in enumerate((3, 17, 40)):
            embed[token] = 2 * basis[10 + place]
        embed[22] = 2 * ask
        # what a token is read by and what it is said by are the same matrix here
        embed[FIRST] = label + one + said_one
        embed[SECOND] = label + other + said_other
        attn = hf.transformer.h[1].attn
        head = 8 * 2
        attn.c_attn.weight[:, head] = 1.2 * ask
        attn.c_attn.weight[:, 24 + head] = 1.2 * label
        attn.c_attn.weight[:, 48 + head] = 2 * one
        attn.c_attn.weight[:, 48 + head + 1] = 2 * other
        attn.c_proj.weight[head] = 2 * said_one
        attn.c_proj.weight[head + 1] = 2 * said_other
    return build_bridge_from_module(
        hf, class_name, hf_config=hf.config, dtype=torch.float32, device="cpu"
    ).eval()


def test_a_planted_head_that_copies_labels_is_found_and_explained():
    result = attributed(planted_model())
    assert result.captured.top_predictions(1)[0][0] == FIRST  # which stands there more often
    found = in_context_heads(result, LABELS)
    heads = found.heads
    best = heads.loc[0]
    assert (best["layer"], best["head"]) == (1, 2)
    assert best["score"] > 10 * heads.loc[1, "score"]
    assert heads["zeroed"].idxmin() == 0 and best["zeroed"] < -1
    assert best["attention_1"] + best["attention_2"] > 0.95
    assert best["contrast_1"] > 1 and best["contrast_2"] < -0.3
    assert best["contrast"] == near(best["contrast_1"] + best["contrast_2"], 0.05)
    there = found.positions.head(4)
    assert there["attention"].between(0.1, 0.4).all()
    assert there["source_pos"].tolist() == [1, 3, 5, 6]
    assert (there["log_prob_difference"] > 0).tolist() == [True, False, True, True]
    others = found.positions[4:]["log_prob_difference"].abs().max()
    assert there["log_prob_difference"].abs().min() > 5 * others

    # its keys are label embeddings, its query asks
    towers = head_inputs(result, "L1.H2", [1, 3, LAST]).set_index(["position", "part"])
    for place, token in ((1, FIRST), (3, SECOND), (LAST, 22)):
        embed = towers.loc[place, "embed"]
        assert embed["share"] > 0.9
        assert embed["raises"][0] == f"<{token}>"
    assert towers.loc[1, "embed"]["value_share"] > 0.9


# --- kinds of model and of request ------------------------------------------------------------


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel"])
def test_both_classes_give_the_same_heads(family):
    ours, theirs = (
        in_context_heads(attributed(make(family)), LABELS, top=100)
        for make in (bridge_of, hooked_of)
    )
    merged = ours.heads.merge(theirs.heads, on=["layer", "head"])
    assert len(merged) == len(ours.heads)
    for name in ours.heads.columns[2:]:
        assert (merged[f"{name}_x"] - merged[f"{name}_y"]).abs().max() < 1e-4, name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_has_its_table(family):
    result = attributed(bridge_of(family))
    found = in_context_heads(result, LABELS, top=100)
    assert len(found.heads) == 3 * result.host.n_heads
    assert found.heads.drop(columns=["layer", "head"]).notna().all(axis=None)
    parts = found.positions.groupby(["layer", "head", "label"])["contrast"].sum().unstack()
    heads = found.heads.set_index(["layer", "head"])
    assert (parts[f"<{FIRST}>"] - heads["contrast_1"]).abs().max() < 1e-5
    assert (parts[f"<{SECOND}>"] - heads["contrast_2"]).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_narrow_weights_are_multiplied_in_float32(family):
    result = attributed(bridge_of(family, dtype=torch.bfloat16))
    assert in_context_heads(result, LABELS).heads["contrast"].notna().all()
    assert head_inputs(result, "L2.H1", [1, LAST])["share"].notna().all()


def test_only_labels_up_to_the_read_position_count(tiny_gpt2):
    result = attributed(tiny_gpt2, position=4)
    found = in_context_heads(result, LABELS, scan=False)
    assert found.label_positions == ((1,), (3,))


# --- what cannot be asked ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            (FIRST, 9),
            r"label '<9>' \(id 9\) does not stand in the prompt up to the read position 7",
        ),
        ((9, SECOND), r"label '<9>'"),
        ((FIRST, FIRST), "the two labels are the same token, '<30>'"),
        ((FIRST, 99), "label id 99 is outside the model's vocabulary of 61"),
        ((FIRST,), "give two labels"),
        ((FIRST, SECOND, 3), "give two labels"),
        ("ab", "give two labels"),
        ((" a", " b"), "the model has no tokenizer to read the label with; give token ids"),
    ],
)
def test_labels_that_cannot_be_are_one_sentence(tiny_gpt2, monkeypatch, labels, message):
    result = attributed(tiny_gpt2)
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    with pytest.raises(InputError, match=message) as error:
        in_context_heads(result, labels)
    assert "\n" not in str(error.value)
    assert not passes


@pytest.mark.parametrize(
    ("head", "positions", "message"),
    [
        ("L3.H0", None, "there is no head L3.H0: the model has 3 layers of 3 heads"),
        ("L0.H3", None, "there is no head L0.H3"),
        ("L0", None, "head label must look like 'L9.H3'"),
        ("L0.H1", 8, "position 8 is out of range: the answer is read at 7"),
        ("L0.H1", [3, -9], "position -9 is out of range"),
        ("L0.H1", [], "no position to look at"),
    ],
)
def test_heads_and_positions_that_cannot_be_are_one_sentence(
    tiny_gpt2, monkeypatch, head, positions, message
):
    result = attributed(tiny_gpt2)
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    with pytest.raises(InputError, match=message) as error:
        head_inputs(result, head, positions)
    assert "\n" not in str(error.value)
    assert not passes


def test_labels_of_a_text_are_tokens_of_it():
    with torch.random.fork_rng():
        model = bundled_model()
    text = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"
    result = attribute(model, Prompt(text=text, target=" Madrid"), top=5)
    found = in_context_heads(result, (" Paris", " Rome"), top=4, scan=False)
    assert [label.text for label in found.labels] == [" Paris", " Rome"]
    assert found.label_positions == ((6,), (13,))
    for labels, message in (
        ((" positive", " Rome"), r"label ' positive' is \d tokens \(.*give a single-token label"),
        ((" Paris", " rome"), r"label ' rome' is \d tokens"),
        ((" Paris", " London"), "label ' London' .* does not stand in the prompt"),
        ((" paris", ""), "label"),
    ):
        with pytest.raises(InputError, match=message):
            in_context_heads(result, labels)
    shouted = attribute(model, text.replace(" Paris", " Rome."), target=" Madrid", top=5)
    with pytest.raises(InputError, match="does not stand in the prompt"):
        in_context_heads(shouted, (" Paris", " Rome"))
