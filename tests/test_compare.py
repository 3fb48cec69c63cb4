"""Two runs compared: both scores by definition, the largest differences proven, in every form."""

import json
import math
import re
from dataclasses import replace

import oracle
import pandas as pd
import pytest
import torch
from conftest import (
    FAMILIES,
    TOKENS,
    bridge_of,
    bundled_model,
    count_forward_passes,
    hooked_of,
    needs_hooked_transformer,
    own_bridge_of,
)
from hypothesis import given
from hypothesis import strategies as st
from test_topk import build, cases

from tl_neuron_attr import (
    AttnNeuron,
    FFNNeuron,
    Head,
    IdentityError,
    InputError,
    Prompt,
    Side,
    Target,
    Zeroed,
    attribute,
    capture,
    capture_zeroed,
    compare,
    neuron_scores,
    open_host,
    projection_index,
    tokenize,
    top_differences,
)
from tl_neuron_attr.intervals import ends_of_blocks
from tl_neuron_attr.tables import (
    COMPARED_HEAD_COLUMNS,
    COMPARED_LAYER_COLUMNS,
    COMPARED_NEURON_COLUMNS,
)

OTHER_TOKENS = (3, 17, 9, 41, 8, 30)
WITHOUT = ["L0.H1", "L1.N3", "L1.H2.D4@2"]


def by_definition(comparison, run, host, kind):
    """Every neuron's coefficient and score: float64, plain Python, the definition alone."""
    original, convention = comparison.original, comparison.original.convention
    rms = host.norm == "rms_norm"
    scale = oracle.norm_scale(
        original.captured.resid_final.double().tolist(),
        convention=convention,
        rms=rms,
        eps=original.host.eps,
    )
    nothing = torch.zeros(host.d_model)
    model = (
        host.final_gain.double().tolist(),
        (nothing if host.final_bias is None else host.final_bias).double().tolist(),
        host.W_U.double().T.tolist(),
        (torch.zeros(host.d_vocab) if host.b_U is None else host.b_U).double().tolist(),
    )

    def log_prob(vector):
        return oracle.log_prob(
            model,
            vector,
            original.target.id,
            scale,
            convention=convention,
            rms=rms,
            eps=host.eps,
        )

    found = {}
    for layer in range(host.n_layers):
        if kind == "ffn":
            mid = run.resid_pre if run.resid_mid is None else run.resid_mid
            base, rows = mid[layer].double().tolist(), host.W_out(layer).double().tolist()
            parts = {
                FFNNeuron(layer, k): (run.mlp_post[layer, k].item(), rows[k])
                for k in range(host.d_mlp)
            }
        else:
            base, rows = run.resid_pre[layer].double().tolist(), host.W_O(layer).double().tolist()
            group = host.n_heads // run.v.shape[2]
            parts = {
                AttnNeuron(layer, h, k, p): (
                    run.pattern[layer, h, p].item() * run.v[layer, p, h // group, k].item(),
                    rows[h][k],
                )
                for h in range(host.n_heads)
                for p in range(run.prompt.read_pos + 1)
                for k in range(host.d_head)
            }
        before = log_prob(base)
        for neuron, (coefficient, row) in parts.items():
            vector = [b + coefficient * r for b, r in zip(base, row, strict=True)]
            found[neuron] = coefficient, log_prob(vector) - before if coefficient else 0.0
    return found


def neuron_of(row):
    if row["kind"] == "ffn":
        return FFNNeuron(row["layer"], row["index"])
    return AttnNeuron(row["layer"], row["head"], row["index"], row["source_pos"])


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize(
    ("family", "convention", "kind", "other"),
    [
        ("gpt2", "exact", "ffn", "zeroed"),
        ("gpt2", "published", "attn", "prompt"),
        ("llama", "exact", "attn", "zeroed"),
        ("llama", "published", "ffn", "model"),
        ("gpt2", "exact", "attn", "model"),
        ("neox-parallel", "exact", "ffn", "prompt"),
    ],
)
def test_scores_coefficients_and_the_best_are_those_of_the_definition(
    family, convention, kind, other, lowest
):
    model = bridge_of(family)
    result = attribute(model, TOKENS, target=9, top=1, convention=convention, dtype=torch.float64)
    what = {"zeroed": WITHOUT, "prompt": OTHER_TOKENS, "model": None}[other]
    comparison = compare(result, bridge_of(family, seed=5) if what is None else what, top=12)
    table = comparison.neurons(kind, lowest=lowest)
    ours = by_definition(comparison, result.captured, result.host, kind)
    theirs = by_definition(comparison, comparison.other.captured, comparison.other.host, kind)
    difference = {neuron: ours[neuron][1] - theirs[neuron][1] for neuron in ours}
    sign = 1 if lowest else -1
    order = sorted(difference, key=lambda neuron: sign * difference[neuron])
    rows = table.to_dict("records")
    assert [neuron_of(row) for row in rows] == order[:12]
    for row in rows:
        neuron = neuron_of(row)
        assert row["coefficient"] == pytest.approx(ours[neuron][0], abs=1e-12)
        assert row["other_coefficient"] == pytest.approx(theirs[neuron][0], abs=1e-12)
        assert row["score"] == pytest.approx(ours[neuron][1], abs=1e-10)
        assert row["other_score"] == pytest.approx(theirs[neuron][1], abs=1e-10)
        assert row["difference"] == pytest.approx(difference[neuron], abs=1e-10)
    certificate = comparison.certificates()["lowest_" * lowest + kind]
    assert certificate["applies"] and not certificate["linear"]
    assert certificate["kth_score"] == rows[-1]["difference"]
    found = comparison.lowest[kind] if lowest else getattr(comparison, f"{kind}_neurons")
    assert found.neurons.certificate.holds and len(found) == 12


# --- the search -------------------------------------------------------------------------------


def sides_of(case, dtype=torch.float32):
    """Two runs of one model, or, with other weights, of two; some neurons alike in both."""
    out, blocks, target = build(case, dtype)
    other_out, others, _ = build({**case, "seed": case["seed"] + 1}, dtype)
    if case["seed"] % 2:
        other_out = out
        weights = [{"W_out": b.W_out} if case["kind"] == "ffn" else {"W_O": b.W_O} for b in blocks]
        others = [replace(b, **w) for b, w in zip(others, weights, strict=True)]
        others[0] = blocks[0]
    pairs = ((blocks, out), (others, other_out))
    first, second = (
        Side(blocks=b, out=o, before=o.baseline(torch.stack([x.base for x in b]), target))
        for b, o in pairs
    )
    dense = [torch.cat([neuron_scores(block, o, target) for block in b]) for b, o in pairs]
    return first, second, dense[0] - dense[1]


@given(cases, st.integers(1, 30), st.booleans())
def test_the_differences_listed_are_those_of_scoring_every_neuron(case, top, lowest):
    first, second, dense = sides_of(case)
    found = top_differences(first, second, top, lowest=lowest)
    flat = found.neurons.number + found.neurons.layer * first.blocks[0].n_neurons
    wanted = dense.sort(descending=not lowest).values[:top]
    slack = 1e-5 * (1 + dense.abs().max())
    torch.testing.assert_close(found.neurons.score, dense[flat], rtol=1e-4, atol=float(slack))
    torch.testing.assert_close(found.neurons.score, wanted, rtol=1e-4, atol=float(slack))
    torch.testing.assert_close(
        found.first_score - found.second_score, found.neurons.score, rtol=0, atol=0
    )
    assert len(flat.unique()) == len(flat) and found.neurons.certificate.holds
    certificate = found.neurons.certificate
    assert certificate.lowest == lowest and certificate.total == len(dense)
    if certificate.next_bound is not None:
        # of those not known to be 0, the best that was not scored is at best next in the order
        behind = dense[dense != 0].sort(descending=not lowest).values[certificate.evaluated :]
        reached = behind[0] if len(behind) else certificate.next_bound
        sign = -1 if lowest else 1
        assert sign * certificate.next_bound >= sign * reached - slack
    blocks = [block.all_coefficients() for block in second.blocks]
    assert torch.equal(found.second_coefficient, torch.cat(blocks)[flat])


def in_float64(value):
    """The same decomposition or read-out with every number exactly what it is in float32."""
    tensors = {name: each for name, each in vars(value).items() if isinstance(each, torch.Tensor)}
    widened = replace(value, **{name: each.double() for name, each in tensors.items()})
    return replace(widened, dtype=torch.float64) if hasattr(value, "dtype") else widened


@given(cases)
def test_intervals_from_norms_hold_every_score(case):
    out, blocks, target = build(case)
    before = out.baseline(torch.stack([block.base for block in blocks]), target)
    for ends, block in zip(ends_of_blocks(blocks, out, before), blocks, strict=True):
        scores = neuron_scores(in_float64(block), in_float64(out), target)
        found = ends.all()
        assert (found.lower <= scores).all() and (scores <= found.upper).all()
        assert (found.lower[found.off] == 0).all() and (found.upper[found.off] == 0).all()


@given(cases)
def test_no_direction_is_farther_than_said(case):
    out, blocks, target = build(case, torch.float64)
    before = out.baseline(torch.stack([block.base for block in blocks]), target)
    found = out.deviations(before)
    gain = out.gain[:, None] * out.W_U
    directions = gain - gain.mean(0) if out.centered else gain
    for base in range(len(before)):
        p = before.log_probs[before.prediction[base]].exp()
        apart = (directions - (directions @ p)[:, None]) / before.norm_scale[base]
        squares = apart.square().sum(0)
        assert found.largest[base] == pytest.approx(float(squares.max()) ** 0.5, rel=1e-6)
        assert found.mean_square[base] >= (p * squares).sum() * (1 - 1e-12)
        assert found.mean_square[base] == pytest.approx(
            float((p * squares).sum()), rel=1e-6, abs=1e-6 * float(squares.max())
        )
    assert found.widest == pytest.approx(float(out.W_U.norm(dim=0).max()))


def test_bounds_spare_most_neurons_and_an_index_more(tmp_path):
    model = bundled_model()
    index = projection_index(model, tmp_path)
    evaluated = {}
    for name, given_index in (("norms", None), ("index", index)):
        result = attribute(model, "The capital of France is", target=" Paris", top=1)
        found = compare(result, "The capital of Spain is", top=30, index=given_index)
        assert found.attn_neurons.neurons.certificate.holds
        evaluated[name] = found.certificates()["attn"]["evaluated"]
        table = found.neurons("attn")[["layer", "head", "index", "source_pos"]]
        ids = table.values.tolist()
        assert evaluated.setdefault("ids", ids) == ids
    assert 30 < evaluated["index"] <= 40 < evaluated["norms"] < 150


@pytest.mark.slow
def test_with_an_index_the_neurons_are_the_same_in_every_family(any_model, tmp_path):
    index = projection_index(any_model, tmp_path)
    plain = attribute(any_model, TOKENS, target=9, top=1)
    indexed = replace(plain, index=index)
    for other in (WITHOUT, OTHER_TOKENS):
        for lowest in (False, True):
            tables = [
                compare(result, other, top=10).neurons(lowest=lowest) for result in (plain, indexed)
            ]
            pd.testing.assert_frame_equal(*tables, atol=1e-6)


def test_the_other_models_index_is_for_the_other_model(tmp_path):
    model, other = bridge_of("gpt2"), bridge_of("gpt2", seed=5)
    indices = [projection_index(each, tmp_path) for each in (model, other)]
    result = attribute(model, TOKENS, target=9, top=1, index=indices[0])
    plain = compare(attribute(model, TOKENS, target=9, top=1), other, top=10)
    found = compare(result, other, top=10, index=indices[1])
    pd.testing.assert_frame_equal(plain.neurons(), found.neurons(), atol=1e-6)
    with pytest.raises(InputError, match="index"):
        compare(result, other, index=indices[0])


# --- what the other run can be ----------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "olmo2"])
def test_what_is_zeroed_scores_0_and_nothing_differs_before(family):
    result = attribute(bridge_of(family), TOKENS, target=9, top=1)
    parts = (Head(1, 1), FFNNeuron(1, 7), AttnNeuron(2, 0, 3, 2))
    comparison = compare(result, Zeroed(parts), top=10**6)
    neurons = comparison.neurons()
    assert len(neurons) == sum(
        block.n_neurons for blocks in (result.ffns, result.attns) for block in blocks
    )
    attention = neurons[neurons["kind"] == "attn"]
    head = attention[(attention["layer"] == 1) & (attention["head"] == 1)]
    (neuron,) = neurons[
        (neurons["layer"] == 1) & (neurons["index"] == 7) & (neurons["kind"] == "ffn")
    ].to_dict("records")
    (source,) = attention[
        (attention["layer"] == 2)
        & (attention["head"] == 0)
        & (attention["index"] == 3)
        & (attention["source_pos"] == 2)
    ].to_dict("records")
    assert (head[["other_coefficient", "other_score"]] == 0).all(axis=None)
    assert (head["difference"] == head["score"]).all() and (head["score"] != 0).all()
    for row in (neuron, source):
        assert (row["other_coefficient"], row["other_score"]) == (0, 0)
    beside = (neurons["layer"] == 1) & (neurons["kind"] == "attn") & (neurons["head"] != 1)
    beside &= neurons["coefficient"] != 0  # a window may hide a source position
    # a norm on what the heads write together has another scale without one of them
    together = result.host.post_norm(1, "attn") is not None
    assert ((neurons[beside]["difference"] != 0) == together).all()
    assert (neurons[neurons["layer"] == 0]["difference"] == 0).all()
    after = (neurons["layer"] == 2) & (neurons["coefficient"] != 0)
    assert (neurons[after]["difference"] != 0).mean() > 0.9
    layers = comparison.layers()
    assert (layers["difference"][layers["layer"] == 0] == 0).all()
    assert (layers["difference"][layers["layer"] > 1] != 0).all()
    heads = comparison.heads().set_index(["layer", "head"])
    assert heads["other_score"][1, 1] == pytest.approx(0, abs=1e-6)
    assert heads["difference"][0, 0] == 0
    assert (heads["difference"][1, 0] != 0) == together


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel", "gptj"])
@pytest.mark.parametrize("parts", ["L1.H1", "L1.N7", "L1.H1,L1.N7", "L0.H0.D2@3", "L2.N1"])
def test_the_other_run_is_the_run_without_the_parts(family, parts):
    """What is taken from the original, so that it differs by 0, is what the run would give."""
    result = attribute(bridge_of(family), TOKENS, target=9, top=1)
    zeroed = Zeroed.parse(parts)
    run = compare(result, zeroed, top=1).other.captured
    (wanted,) = capture_zeroed(result.host, [result.captured.prompt], [zeroed])
    for name, tensor in vars(wanted).items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(getattr(run, name), tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_zeroing_ffn_neurons_leaves_the_layers_attention_as_it_was(tiny_model):
    result = attribute(tiny_model, TOKENS, target=9, top=1)
    comparison = compare(result, FFNNeuron(1, 7), top=10**6)
    neurons = comparison.neurons("attn")
    assert (neurons["difference"][neurons["layer"] < 2] == 0).all()
    layers = comparison.layers().set_index(["layer", "kind"])["difference"]
    assert layers[1, "attn"] == 0 != layers[1, "ffn"]
    assert comparison.other.what == "the same prompt without L1.N7"
    assert comparison.log_prob != comparison.own_log_prob


def test_zeroing_the_last_layer_differs_there_alone(tiny_gpt2):
    result = attribute(tiny_gpt2, TOKENS, target=9, top=1)
    neurons = compare(result, ["L2.N5"], top=10**6).neurons()
    changed = neurons[neurons["difference"] != 0]
    assert changed[["kind", "layer", "index"]].values.tolist() == [["ffn", 2, 5]]


def test_the_same_run_differs_nowhere(tiny_model):
    result = attribute(tiny_model, TOKENS, target=9, top=20)
    for other in (TOKENS, result.captured, result, tiny_model):
        comparison = compare(result, other, top=20)
        for table in (comparison.layers(), comparison.heads(), comparison.neurons()):
            assert (table["difference"] == 0).all()
            assert (table["score"] == table["other_score"]).all()
        assert (comparison.neurons(lowest=True)["difference"] == 0).all()
        certificate = comparison.certificates()["ffn"]
        assert certificate["evaluated"] == 0 and certificate["next_bound"] is None
        assert comparison.log_prob == pytest.approx(result.log_prob, abs=1e-6)


def test_another_prompt_in_every_form_gives_the_same(tiny_gpt2):
    result = attribute(tiny_gpt2, TOKENS, target=9, position=4, top=5)
    host = result.host
    captured = capture(host, tokenize(host, Prompt(tokens=OTHER_TOKENS, position=4)))
    forms = (
        OTHER_TOKENS,
        list(OTHER_TOKENS),
        torch.tensor([OTHER_TOKENS]),
        Prompt(tokens=OTHER_TOKENS, position=4),
        captured,
        attribute(tiny_gpt2, OTHER_TOKENS, position=-2, top=1),
    )
    first, *others = (compare(result, form, top=5) for form in forms)
    assert first.other.captured.prompt.read_pos == 4
    for other in others:
        pd.testing.assert_frame_equal(first.neurons(), other.neurons(), atol=1e-6)
        pd.testing.assert_frame_equal(first.layers(), other.layers(), atol=1e-6)
    layers = first.layers()["other_score"].to_numpy().reshape(-1, 2).T
    alone = attribute(tiny_gpt2, captured, target=9, top=1)
    # its norm is the original's, not its own
    own = replace(alone, out=result.out)
    assert own.out is result.out
    assert not (abs(layers[0] - alone.layer_scores.attn.numpy()) < 1e-6).all()


def test_another_prompt_is_scored_at_the_originals_scale():
    model = bundled_model()
    result = attribute(model, "The capital of France is", target=" Paris", top=5)
    comparison = compare(result, "The capital of Spain is", top=5)
    run = comparison.other.captured
    wanted = result.out.log_prob(run.resid_final, result.target)
    assert comparison.log_prob == pytest.approx(float(wanted), abs=1e-5)
    own = run.logits.log_softmax(-1)[result.target.id]
    assert comparison.own_log_prob == pytest.approx(float(own), abs=1e-5)
    table = comparison.neurons("attn", 3, tokens=2)
    added = ["source_token", "other_source_token", "raises", "lowers"]
    assert [*table.columns] == [*COMPARED_NEURON_COLUMNS, *added]
    here = table[table["source_pos"] == 4]
    assert set(here["source_token"]) == {" France"} and set(here["other_source_token"]) == {
        " Spain"
    }
    assert all(len(tokens) == 2 for tokens in table["raises"])


def test_raises_and_lowers_have_the_sign_of_the_run_that_the_neuron_is_on_in():
    model = bundled_model()
    whole = attribute(model, "The capital of France is", target=" Paris", top=300)
    host, prompt = whole.host, whole.captured.prompt
    (without,) = capture_zeroed(host, [prompt], [Zeroed((Head(3, 2),))])
    found = compare(attribute(model, without, target=" Paris", top=1), whole, top=300)
    signs = set()
    for row in found.neurons("attn", lowest=True, tokens=2).to_dict("records"):
        here, there = row["coefficient"], row["other_coefficient"]
        assert ((row["layer"], row["head"]) == (3, 2)) == (here == 0)
        sign = math.copysign(1, there if here == 0 else here)
        vector = sign * host.W_O(row["layer"])[row["head"], row["index"]]
        logits = whole.out.linear(vector) @ host.W_U
        assert row["raises"][0] == host.token_text(int(logits.argmax()))
        assert row["lowers"][0] == host.token_text(int(logits.argmin()))
        signs.add((here == 0, sign))
    assert len(signs) == 4


def test_another_checkpoint_is_read_out_by_its_own_weights(tiny_gpt2):
    other = bridge_of("gpt2", seed=5)
    result = attribute(tiny_gpt2, TOKENS, target=9, top=5)
    comparison = compare(result, other, top=5)
    run = comparison.other.captured
    assert run.prompt.tokens == TOKENS
    assert comparison.own_log_prob == pytest.approx(float(run.logits.log_softmax(-1)[9]), abs=1e-5)
    assert comparison.sides["ffn"][1].out.W_U.data_ptr() == open_host(other).W_U.data_ptr()
    assert comparison.sides["ffn"][1].out.norm_scale == result.out.norm_scale
    on_another = compare(result, other, prompt=OTHER_TOKENS, top=5)
    assert on_another.other.captured.prompt.tokens == OTHER_TOKENS
    given_run = compare(result, attribute(other, OTHER_TOKENS, top=1), top=5)
    pd.testing.assert_frame_equal(on_another.neurons(), given_run.neurons(), atol=1e-6)


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel"])
def test_both_classes_compare_alike(family):
    tables = []
    for model in (bridge_of(family), hooked_of(family)):
        result = attribute(model, TOKENS, target=9, top=1)
        tables.append(
            [compare(result, other, top=8).neurons() for other in (WITHOUT, OTHER_TOKENS)]
        )
    for ours, theirs in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(ours, theirs, atol=1e-4)


# --- conventions and targets ------------------------------------------------------------------


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("other", [WITHOUT, OTHER_TOKENS])
def test_a_contrast_needs_no_bound(tiny_model, other, lowest):
    result = attribute(tiny_model, TOKENS, target=9, against=4, top=1)
    comparison = compare(result, other, top=15)
    for kind in ("ffn", "attn"):
        first, second = comparison.sides[kind]
        dense = [
            torch.cat([neuron_scores(block, side.out, result.target) for block in side.blocks])
            for side in (first, second)
        ]
        table = comparison.neurons(kind, lowest=lowest)
        wanted = (dense[0] - dense[1]).sort(descending=not lowest).values[:15]
        torch.testing.assert_close(
            torch.tensor(table["difference"].tolist()), wanted, rtol=1e-4, atol=1e-6
        )
        certificate = comparison.certificates()["lowest_" * lowest + kind]
        assert certificate["linear"] and certificate["applies"]
        assert certificate["evaluated"] < 40


@pytest.mark.parametrize("lowest", [False, True])
def test_a_recomputed_norm_has_no_bounds_so_every_neuron_is_scored(tiny_model, lowest):
    result = attribute(tiny_model, TOKENS, target=9, top=1, convention="recomputed")
    comparison = compare(result, OTHER_TOKENS, top=15)
    first, second = comparison.sides["ffn"]
    dense = [
        torch.cat([neuron_scores(block, side.out, result.target) for block in side.blocks])
        for side in (first, second)
    ]
    table = comparison.neurons("ffn", lowest=lowest)
    wanted = (dense[0] - dense[1]).sort(descending=not lowest).values[:15]
    torch.testing.assert_close(
        torch.tensor(table["difference"].tolist()), wanted, rtol=1e-4, atol=1e-6
    )
    certificate = comparison.certificates()["lowest_" * lowest + "ffn"]
    assert not certificate["applies"] and certificate["evaluated"] == len(dense[0])
    assert comparison.log_prob == pytest.approx(comparison.own_log_prob, abs=1e-6)


# --- tables and files -------------------------------------------------------------------------


def test_tables_have_their_columns_and_are_saved_together(tiny_gpt2, tmp_path):
    result = attribute(tiny_gpt2, TOKENS, target=9, top=5)
    comparison = compare(result, WITHOUT, top=5)
    comparison.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "heads.parquet",
        "layers.parquet",
        "neurons.parquet",
        "run.json",
    ]
    for name, columns in (
        ("layers", COMPARED_LAYER_COLUMNS),
        ("heads", COMPARED_HEAD_COLUMNS),
        ("neurons", COMPARED_NEURON_COLUMNS),
    ):
        table = pd.read_parquet(tmp_path / "out" / f"{name}.parquet")
        more = ["source_token", "other_source_token", "raises", "lowers"] * (name == "neurons")
        assert [*table.columns] == [*columns, *more]
        found = getattr(comparison, name)()
        pd.testing.assert_frame_equal(table[[*columns]], found, check_dtype=False)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["other"]["zeroed"] == WITHOUT and facts["other"]["tokens"] == [*TOKENS]
    assert set(facts["certificates"]) == {"ffn", "attn"}
    assert facts["target"]["log_prob"] == result.log_prob
    comparison.neurons(lowest=True)
    assert set(comparison.certificates()) == {"ffn", "attn", "lowest_ffn", "lowest_attn"}
    heads = comparison.heads(top=3)
    assert heads["difference"].is_monotonic_decreasing and len(heads) == 3
    table = comparison.neurons()
    assert table["rank"].tolist() == [1, 2, 3, 4, 5] * 2
    assert table["difference"].to_numpy() == pytest.approx(table["score"] - table["other_score"])


# --- requests that cannot be met --------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Zeroed(), "nothing is zeroed, so nothing would differ"),
        ([], "nothing is zeroed"),
        (["L9.H0"], "there is no head L9.H0: the model has 3 layers"),
        ("L0.H3,L0.H1", r"could be a prompt or a label: give \['L0.H3,L0.H1'\] to zero it"),
        (TOKENS[:4], "the original is 6 tokens, the other 4; compare prompts of as many tokens"),
        (Prompt(tokens=OTHER_TOKENS, position=3), "the original at 5, the other at 3"),
        (Prompt(tokens=OTHER_TOKENS, target=3), "leave out the other's"),
        ((99,) * 6, "token id 99 at position 0"),
        (3.5, "can be changed, not 3.5"),
        ([Head(0, 0), 3], "can be changed, not 3"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_forward_pass(
    tiny_gpt2, monkeypatch, other, message
):
    result = attribute(tiny_gpt2, TOKENS, target=9, top=1)
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    with pytest.raises(InputError, match=message):
        compare(result, other)
    assert passes == []


def test_models_of_different_shape_are_refused_naming_what_differs(tiny_gpt2, monkeypatch):
    result = attribute(tiny_gpt2, TOKENS, target=9, top=1)
    other = bridge_of("llama")
    passes = count_forward_passes(other, monkeypatch)
    with pytest.raises(InputError) as caught:
        compare(result, other)
    message = str(caught.value)
    assert re.match("the models are of different shape: 3 and 4 heads, 3 and 2 key-value", message)
    assert "96 and 40 FFN neurons a layer" in message and "compare checkpoints of one" in message
    assert "layers" not in message.replace("a layer", "")
    with pytest.raises(InputError, match="blocks as in GPTNeoXForCausalLM and as in GPTNeoX"):
        compare(attribute(bridge_of("neox"), TOKENS, target=9, top=1), bridge_of("neox-parallel"))
    assert passes == []


def test_other_misfits_are_refused(tiny_gpt2):
    result = attribute(tiny_gpt2, TOKENS, target=9, top=3)
    with pytest.raises(InputError, match="prompt= belongs beside another model"):
        compare(result, WITHOUT, prompt=OTHER_TOKENS)
    with pytest.raises(InputError, match="activations are of another model"):
        compare(result, attribute(bridge_of("llama"), TOKENS, top=1).captured)
    with pytest.raises(InputError, match="top must be at least 1"):
        compare(result, WITHOUT, top=0)
    with pytest.raises(InputError, match="no longer gives"):
        changed = own_bridge_of("gpt2")
        old = attribute(changed, TOKENS, target=9, top=1)
        with torch.no_grad():
            changed.blocks[0].mlp.W_out[3] += 1
        compare(old, WITHOUT)
    with pytest.raises(IdentityError):
        broken = replace(result.captured, mlp_post=result.captured.mlp_post * 2)
        compare(result, broken)
    comparison = compare(result, WITHOUT, top=3)
    with pytest.raises(InputError, match=r"only 3 ffn neurons were ranked; call compare\(..., top"):
        comparison.neurons("ffn", 4)


def test_the_targets_are_the_originals(tiny_gpt2):
    result = attribute(tiny_gpt2, TOKENS, target=9, top=1)
    other = attribute(tiny_gpt2, OTHER_TOKENS, target=30, top=1)
    assert compare(result, other, top=1).original.target == Target(9, "<9>")
    assert compare(result, other, top=1).log_prob == pytest.approx(
        float(result.out.log_prob(other.captured.resid_final, result.target)), abs=1e-5
    )


def test_a_checkpoint_with_another_final_norm_changes_every_score():
    one, other = bridge_of("gpt2"), own_bridge_of("gpt2")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # no coefficient and no base differ, only what they are read out with
        gain = other.ln_final.weight
        gain.mul_(1 + torch.rand(gain.shape, generator=generator))
    result = attribute(one, TOKENS, target=9, top=1)
    comparison = compare(result, other, top=12)
    for kind in ("ffn", "attn"):
        first, second = comparison.sides[kind]
        dense = torch.cat(
            [
                neuron_scores(a, first.out, result.target)
                - neuron_scores(b, second.out, result.target)
                for a, b in zip(first.blocks, second.blocks, strict=True)
            ]
        )
        best = dense.sort(descending=True).values[:12]
        found = comparison.neurons(kind)["difference"].to_numpy()
        assert found == pytest.approx(best.tolist(), abs=1e-5)
        assert found[0] > 1e-4
