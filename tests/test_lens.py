"""log p(target) after each layer at every position: by definition, and by what else is known."""

import warnings
from dataclasses import replace

import oracle
import pandas as pd
import pytest
import torch
from conftest import (
    TOKENS,
    bridge_of,
    count_forward_passes,
    hooked_of,
    needs_hooked_transformer,
    own_bridge_of,
)

from tl_neuron_attr import InputError, Prompt, attribute, capture, open_host, tokenize
from tl_neuron_attr.tables import LOG_PROB_COLUMNS

CONVENTIONS = ("exact", "published", "recomputed")


def attributed(model, prompt=TOKENS, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return attribute(model, prompt, top=2, **options)


def by_definition(model, result):
    """Every cell: float64, plain Python, from the cache of a run of the caller's own."""
    host, convention = result.host, result.convention
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    stations = [cache[f"blocks.{layer}.hook_resid_pre"][0] for layer in range(host.n_layers)]
    stations.append(cache[f"blocks.{host.n_layers - 1}.hook_resid_post"][0])
    rms = host.norm == "rms_norm"
    options = dict(convention=convention, rms=rms, eps=host.eps)
    widths = {"gain": host.d_model, "bias": host.d_model, "b_U": host.d_vocab}
    given = {"gain": host.final_gain, "bias": host.final_bias, "b_U": host.b_U}
    nothing = {"gain": torch.ones, "bias": torch.zeros, "b_U": torch.zeros}
    gain, bias, b_U = (
        (nothing[name](widths[name]) if each is None else each).double().tolist()
        for name, each in given.items()
    )
    weights = (gain, bias, host.W_U.double().T.tolist(), b_U)
    table = []
    for layer, station in zip([None, *range(host.n_layers)], stations, strict=True):
        for position in range(result.captured.prompt.read_pos + 1):
            final = stations[-1][position].double().tolist()
            scale = oracle.norm_scale(final, **options)
            vector = station[position].double().tolist()
            log_prob = oracle.log_prob(
                weights, vector, result.target.id, scale, soft_cap=host.soft_cap, **options
            )
            table.append((layer, position, log_prob))
    return table


def rows_of(table):
    layers = [None if pd.isna(layer) else layer for layer in table["layer"]]
    return list(zip(layers, table["position"], table["log_prob"], strict=True))


def assert_the_same(found, wanted, tolerance):
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    assert [row[2] for row in found] == pytest.approx(
        [row[2] for row in wanted], abs=tolerance, rel=tolerance
    )


def test_every_cell_is_what_the_definition_says_under_a_soft_cap():
    model = bridge_of("gemma2")
    result = attributed(model, target=7)
    assert_the_same(rows_of(result.log_probs()), by_definition(model, result), 2e-5)


def test_every_cell_is_what_the_definition_says_in_every_family(any_model):
    result = attributed(any_model, target=7)
    assert_the_same(rows_of(result.log_probs()), by_definition(any_model, result), 2e-5)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel"])
def test_every_cell_is_what_the_definition_says_in_float64(family, convention):
    model = bridge_of(family, dtype=torch.float64)
    result = attributed(model, Prompt(tokens=TOKENS, position=4, target=7), convention=convention)
    assert_the_same(rows_of(result.log_probs()), by_definition(model, result), 1e-9)


@needs_hooked_transformer
@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel"])
def test_the_other_class_gives_what_the_definition_says(family, processed):
    model = hooked_of(family, processed=processed)
    result = attributed(model, target=7)
    assert_the_same(rows_of(result.log_probs()), by_definition(model, result), 2e-5)


@pytest.mark.parametrize("against", [None, 11])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_read_position_goes_from_the_embedding_to_the_answer_by_the_layers_scores(
    tiny_model, convention, against
):
    result = attributed(tiny_model, target=7, against=against, convention=convention)
    table = result.log_probs()
    assert list(table.columns) == list(LOG_PROB_COLUMNS)
    assert table["layer"].isna().sum() == len(TOKENS)
    here = table[table["position"] == len(TOKENS) - 1]["log_prob"].to_numpy()
    assert here[0] == pytest.approx(result.embedding_log_prob, abs=1e-5)
    assert here[-1] == pytest.approx(result.log_prob, abs=1e-5)
    steps = result.layers().groupby("layer")["score"].sum().to_numpy()
    assert here[1:] - here[:-1] == pytest.approx(steps, abs=2e-5)


def test_every_position_ends_at_the_models_own_prediction_there(tiny_model):
    result = attributed(tiny_model, target=7)
    table = result.log_probs()
    with torch.no_grad():
        own = tiny_model(torch.tensor([TOKENS]))[0].log_softmax(-1)[:, 7].tolist()
    last = table[table["layer"] == result.host.n_layers - 1]
    assert last["log_prob"].tolist() == pytest.approx(own, abs=1e-5)
    assert last["token"].tolist() == list(result.captured.prompt.token_texts)


def test_a_small_budget_takes_more_passes_and_gives_the_same(tiny_gpt2, monkeypatch):
    result = attributed(tiny_gpt2, target=7)
    at_once = result.log_probs()
    host, captured = result.host, result.captured
    of_position = (host.n_layers + 1) * host.d_model * 4
    small = replace(result, out=replace(result.out, budget=4 * of_position))
    assert small.out.rows_per_block >= 1
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    found = small.log_probs()
    assert len(passes) == 2  # six positions, four at a time
    assert found["log_prob"].tolist() == pytest.approx(at_once["log_prob"].tolist(), abs=1e-6)
    assert captured.prompt.read_pos == 5


def test_only_what_comes_before_the_read_position_is_listed(tiny_gpt2):
    early = attributed(tiny_gpt2, Prompt(tokens=TOKENS, position=2, target=7)).log_probs()
    assert set(early["position"]) == {0, 1, 2}
    late = attributed(tiny_gpt2, target=7).log_probs()
    same = late[late["position"] <= 2]
    # causal attention: what comes later changes nothing
    assert early["log_prob"].tolist() == pytest.approx(same["log_prob"].tolist(), abs=1e-5)


def test_a_run_that_is_not_the_one_captured_is_refused_and_saving_says_so(tmp_path):
    model = own_bridge_of("gpt2")
    captured = capture(open_host(model), tokenize(open_host(model), Prompt(tokens=TOKENS)))
    result = attributed(model, captured)
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "log_probs.parquet").exists()
    with torch.no_grad():
        model.blocks[1].mlp.W_out.mul_(1.5)
    with pytest.raises(InputError, match="no longer gives the activations"):
        result.log_probs()
    result.save(tmp_path / "out")
    assert not (tmp_path / "out" / "log_probs.parquet").exists()
    said = (tmp_path / "out" / "run.json").read_text()
    assert "no log p by layer and position: prompt 0" in said


def test_saved_log_probs_are_the_tables(tiny_gpt2, tmp_path):
    result = attributed(tiny_gpt2, target=7)
    result.save(tmp_path)
    saved = pd.read_parquet(tmp_path / "log_probs.parquet")
    pd.testing.assert_frame_equal(saved, result.log_probs())
