"""Zeroed is zeroed: as the weights would have it, in every family, and nothing else is touched."""

import copy

import pytest
import torch
from conftest import (
    FAMILIES,
    TOKENS,
    bridge_of,
    count_forward_passes,
    hooked_of,
    needs_hooked_transformer,
    own_bridge_of,
)

from tl_neuron_attr import (
    AttnNeuron,
    FFNNeuron,
    Head,
    InputError,
    NonFiniteError,
    Prompt,
    Zeroed,
    attribute,
    capture,
    capture_zeroed,
    forward,
    head_scan,
    open_host,
    tokenize,
    verify,
    zeroed_residuals,
)
from tl_neuron_attr.capture import capture_all
from tl_neuron_attr.decompose import attn_decomposition, ffn_decomposition
from tl_neuron_attr.hook_points import hook_names, last_ffn_input_name
from tl_neuron_attr.interventions import as_zeroed, batches
from tl_neuron_attr.readout import read_out

PARTS = (
    Zeroed((Head(1, 2),)),
    Zeroed((FFNNeuron(0, 7), FFNNeuron(2, 3))),
    Zeroed((AttnNeuron(1, 0, 4),)),
    Zeroed((AttnNeuron(2, 1, 3, 2), AttnNeuron(0, 1, 3, 2), AttnNeuron(0, 1, 3, 5))),
    Zeroed((Head(0, 0), AttnNeuron(0, 0, 1, 2), FFNNeuron(1, 1), AttnNeuron(2, 2, 0))),
    Zeroed(),
)


def asked(host, tokens=TOKENS, **options):
    return tokenize(host, Prompt(tokens=tokens, **options))


def logits_of(model, tokens=TOKENS, hooks=()):
    with torch.no_grad():
        return model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=list(hooks))[0]


def residual_by_hand(host, prompt, zeroed):
    """The last residual in a run of its own, through hooks written one part at a time."""
    return run_by_hand(host, prompt, zeroed, f"blocks.{host.n_layers - 1}.hook_resid_post")[
        prompt.read_pos
    ]


def run_by_hand(host, prompt, zeroed, wanted):
    hooks, seen = [], {}

    def edited(part, carried):
        def edit(activation, hook):
            activation = activation.clone()
            if isinstance(part, FFNNeuron):
                activation[0, :, part.index] = 0
            elif isinstance(part, Head):
                activation[0, :, part.head] = 0
            elif part.source_pos is None:
                activation[0, :, part.head, part.index] = 0
            else:
                activation[0, prompt.read_pos, part.head, part.index] -= carried
            return activation

        return edit

    # what has a source first: of what is zeroed altogether nothing must be left
    order = sorted(zeroed.parts, key=lambda part: getattr(part, "source_pos", None) is None)
    for part in order:
        names, carried = hook_names(host, part.layer), None
        if getattr(part, "source_pos", None) is not None:
            # what it carries depends on what is zeroed in the layers before, and on nothing else
            below = Zeroed(tuple(each for each in zeroed.parts if each.layer < part.layer))
            pattern = run_by_hand(host, prompt, below, names["pattern"])
            v = run_by_hand(host, prompt, below, names["v"])
            weight = pattern[part.head, prompt.read_pos, part.source_pos]
            group = host.n_heads // v.shape[1]
            carried = weight * v[part.source_pos, part.head // group, part.index]
        name = names["mlp_post" if isinstance(part, FFNNeuron) else "z"]
        hooks.append((name, edited(part, carried)))
    hooks.append((wanted, lambda activation, hook: seen.update({wanted: activation[0]})))
    logits_of(host.model, prompt.tokens, hooks)
    return seen[wanted]


# --- what zeroing means -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel", "gptj", "opt", "bloom"])
def test_zeroing_equals_zeroing_the_rows_of_the_weights(family):
    model = own_bridge_of(family)
    host = open_host(model)
    cases = (
        (Zeroed((FFNNeuron(1, 7), FFNNeuron(0, 2))), lambda m: m.blocks[1].mlp, None),
        (Zeroed((Head(1, 2),)), None, None),
        (Zeroed((AttnNeuron(1, 2, 3),)), None, None),
    )
    for zeroed, *_ in cases:
        edited = copy.deepcopy(model)
        with torch.no_grad():
            for part in zeroed.parts:
                block = edited.blocks[part.layer]
                if isinstance(part, FFNNeuron):
                    rows = block.mlp.W_out
                    assert rows.data_ptr() != model.blocks[part.layer].mlp.W_out.data_ptr()
                    rows[part.index] = 0
                else:
                    rows = block.attn.W_O
                    rows[part.head, getattr(part, "index", slice(None))] = 0
        wanted = logits_of(edited)[-1].log_softmax(-1)
        assert (wanted - logits_of(model)[-1].log_softmax(-1)).abs().max() > 1e-4
        captured = capture_zeroed(host, [asked(host)], [zeroed])[0]
        torch.testing.assert_close(captured.logits.log_softmax(-1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_rows_without_different_parts_equals_runs_one_at_a_time(family):
    host = open_host(bridge_of(family))
    prompts = [asked(host), asked(host, TOKENS[:4]), *[asked(host)] * 3, asked(host, position=3)]
    zeroed = [PARTS[0], PARTS[2], *PARTS[2:5], PARTS[3]]
    zeroed[-1] = Zeroed((AttnNeuron(2, 1, 3, 2), FFNNeuron(2, 3)))
    resid = zeroed_residuals(host, prompts, zeroed)
    captures = capture_zeroed(host, prompts, zeroed)
    for row, (prompt, parts) in enumerate(zip(prompts, zeroed, strict=True)):
        wanted = residual_by_hand(host, prompt, parts)
        torch.testing.assert_close(resid[row], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(captures[row].resid_final, wanted, rtol=1e-5, atol=1e-5)
        assert captures[row].prompt == prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_a_capture_without_parts_meets_every_identity_and_has_coefficient_0_there(family):
    host = open_host(bridge_of(family))
    prompt = asked(host)
    whole = capture(host, prompt)
    for zeroed, captured in zip(
        PARTS, capture_zeroed(host, [prompt] * len(PARTS), PARTS), strict=True
    ):
        verify(host, captured, own_run=False)
        off_ffn = {part for part in zeroed.parts if isinstance(part, FFNNeuron)}
        for layer in range(host.n_layers):
            ffn = ffn_decomposition(host, captured, layer).all_coefficients()
            attn = attn_decomposition(host, captured, layer).coefficients()
            before = attn_decomposition(host, whole, layer).coefficients()
            off = torch.zeros_like(attn, dtype=torch.bool)
            for part in zeroed.parts:
                if part.layer == layer and not isinstance(part, FFNNeuron):
                    source = getattr(part, "source_pos", None)
                    off[
                        part.head,
                        slice(None) if source is None else source,
                        getattr(part, "index", slice(None)),
                    ] = True
            assert not attn[off].any() and before[off].all()
            assert attn[~off].count_nonzero() == before[~off].count_nonzero()
            here = [part.index for part in off_ffn if part.layer == layer]
            assert not ffn[here].any()
            assert family == "opt" or whole.mlp_post[layer, here].all()  # ReLU: 0 anyway
        first = min((part.layer for part in zeroed.parts), default=host.n_layers - 1)
        before = slice(first + 1)
        torch.testing.assert_close(captured.resid_pre[before], whole.resid_pre[before])


def test_zeroing_nothing_changes_nothing(any_model):
    host = open_host(any_model)
    prompt = asked(host)
    (captured,) = capture_zeroed(host, [prompt], [Zeroed()])
    (whole,) = capture_all(host, [prompt])
    assert torch.equal(captured.logits, whole.logits) and torch.equal(captured.v, whole.v)
    resid = zeroed_residuals(host, [prompt], [Zeroed()])[0]
    torch.testing.assert_close(resid, whole.resid_final, rtol=1e-6, atol=1e-6)


def test_rows_do_not_touch_each_other(tiny_model):
    host = open_host(tiny_model)
    prompt = asked(host)
    resid = zeroed_residuals(host, [prompt] * 3, [Zeroed(), PARTS[4], Zeroed()])
    torch.testing.assert_close(resid[0], capture(host, prompt).resid_final)
    assert torch.equal(resid[0], resid[2]) and not torch.equal(resid[0], resid[1])


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel", "gptj"])
def test_both_classes_run_without_the_same_parts_alike(family):
    hosts = [open_host(bridge_of(family)), open_host(hooked_of(family))]
    ran = []
    for host in hosts:
        prompts = [asked(host), asked(host, TOKENS[:4]), *[asked(host)] * 3]
        zeroed = [PARTS[0], PARTS[1], *PARTS[2:5]]
        captures = capture_zeroed(host, prompts, zeroed)
        for captured in captures:
            verify(host, captured, own_run=False)
        resid = zeroed_residuals(host, prompts, zeroed)
        torch.testing.assert_close(
            resid, torch.stack([each.resid_final for each in captures]), rtol=1e-5, atol=1e-5
        )
        out = read_out(host, resid[0], "recomputed")
        ran.append(out.logits(resid).log_softmax(-1))
    torch.testing.assert_close(*ran, rtol=1e-4, atol=1e-4)


# --- the head scan ----------------------------------------------------------------------------


def scan_by_hand(host, prompt, target):
    """One forward pass for each head, and the model's own logits."""

    def log_prob(hooks=()):
        log_probs = logits_of(host.model, prompt.tokens, hooks)[prompt.read_pos].log_softmax(-1)
        other = 0.0 if target.against is None else log_probs[target.against.id]
        return float(log_probs[target.id] - other)

    def without(head):
        def edit(z, hook):
            z = z.clone()
            z[:, :, head] = 0
            return z

        return edit

    whole = log_prob()
    return torch.tensor(
        [
            [
                log_prob([(hook_names(host, layer)["z"], without(head))]) - whole
                for head in range(host.n_heads)
            ]
            for layer in range(host.n_layers)
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_scan_equals_one_forward_pass_for_each_head(family):
    result = attribute(bridge_of(family), TOKENS, target=9, top=1)
    found = head_scan(result.host, result.captured, result.target)
    assert result.head_scan()["change"].tolist() == found.flatten().tolist()
    wanted = scan_by_hand(result.host, result.captured.prompt, result.target)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert wanted.abs().max() > 1e-2


@needs_hooked_transformer
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel", "gptj"])
def test_the_head_scan_of_a_hooked_transformer_equals_one_forward_pass_for_each_head(family):
    result = attribute(hooked_of(family), TOKENS, target=9, top=1)
    found = head_scan(result.host, result.captured, result.target)
    wanted = scan_by_hand(result.host, result.captured.prompt, result.target)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("convention", ["exact", "published", "recomputed"])
def test_the_head_scan_is_of_the_models_own_prediction(tiny_model, convention):
    result = attribute(
        tiny_model, TOKENS, target=9, against=4, position=3, top=1, convention=convention
    )
    found = head_scan(result.host, result.captured, result.target)
    wanted = scan_by_hand(result.host, result.captured.prompt, result.target)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_an_ffn_that_flattens_its_positions_is_not_spared_any():
    assert last_ffn_input_name(open_host(bridge_of("opt"))) is None
    assert last_ffn_input_name(open_host(bridge_of("llama"))) is not None


def test_the_head_scan_runs_each_layer_once_and_skips_those_before(tiny_gpt2, monkeypatch):
    result = attribute(tiny_gpt2, TOKENS, target=9, top=1)
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    ran = []
    handles = [
        block.attn.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(tiny_gpt2.blocks)
    ]
    head_scan(result.host, result.captured, result.target)
    for handle in handles:
        handle.remove()
    assert len(passes) == 1 + result.host.n_layers
    assert ran == [0, 1, 2, 0, 1, 2, 1, 2, 2]
    assert not any("forward" in vars(block) for block in tiny_gpt2.blocks)


def test_many_heads_of_a_long_prompt_are_run_in_parts(tiny_gpt2, monkeypatch):
    result = attribute(tiny_gpt2, TOKENS, target=9, top=1)
    whole = head_scan(result.host, result.captured, result.target)
    monkeypatch.setattr(forward, "_TOKENS_AT_A_TIME", 2 * len(TOKENS))
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    torch.testing.assert_close(head_scan(result.host, result.captured, result.target), whole)
    assert len(passes) == 1 + 2 * result.host.n_layers


def test_the_callers_hooks_stay_in_force_and_see_whole_activations(tiny_model):
    shapes = []

    def edit(mlp_post, hook):
        shapes.append(tuple(mlp_post.shape[1:]))
        return mlp_post * 0.5

    host = open_host(tiny_model)
    last = hook_names(host, host.n_layers - 1)["mlp_post"]
    with torch.no_grad():
        whole = head_scan(host, capture(host, asked(host)), attribute(tiny_model, TOKENS).target)
    with tiny_model.hooks(fwd_hooks=[(last, edit)]):
        result = attribute(tiny_model, TOKENS, target=9, top=1)
        found = head_scan(host, result.captured, result.target)
        wanted = scan_by_hand(host, result.captured.prompt, result.target)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert set(shapes) == {(len(TOKENS), host.d_mlp)}
    assert not torch.allclose(found, whole)


def test_a_block_that_fails_leaves_the_model_as_it_was(tiny_gpt2, monkeypatch):
    result = attribute(tiny_gpt2, TOKENS, target=9, top=1)
    from tl_neuron_attr.interventions import rows

    real = rows._zero

    def failing(activation, hook, *, mask):
        if hook.name.startswith("blocks.2."):
            raise RuntimeError("on purpose")
        return real(activation, hook, mask=mask)

    monkeypatch.setattr(rows, "_zero", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        head_scan(result.host, result.captured, result.target)
    assert not any("forward" in vars(block) for block in tiny_gpt2.blocks)


def test_a_forward_that_someone_put_on_a_block_is_put_back(tiny_gpt2):
    block = tiny_gpt2.blocks[0]
    theirs = block.forward
    vars(block)["forward"] = theirs
    try:
        result = attribute(tiny_gpt2, TOKENS, target=9, top=1)
        head_scan(result.host, result.captured, result.target)
        assert vars(block)["forward"] is theirs
    finally:
        del vars(block)["forward"]


def test_a_run_that_is_no_longer_the_captured_one_is_refused():
    model = own_bridge_of("gpt2")
    result = attribute(model, TOKENS, target=9, top=1)
    with torch.no_grad():
        model.blocks[0].mlp.W_out[3] += 1
    with pytest.raises(InputError, match="no longer gives"):
        head_scan(result.host, result.captured, result.target)


def test_activations_that_are_not_finite_are_refused():
    model = own_bridge_of("gpt2")
    host = open_host(model)
    with torch.no_grad():
        model.blocks[2].mlp.W_out[3] = torch.inf
    with pytest.raises(NonFiniteError, match="last block"):
        zeroed_residuals(host, [asked(host)], [PARTS[0]])
    with pytest.raises(NonFiniteError):
        capture_zeroed(host, [asked(host)], [PARTS[0]])


# --- the value --------------------------------------------------------------------------------


def test_labels_are_read_back_and_each_part_is_there_once():
    zeroed = Zeroed.parse("L3.H2, L9.N12,L9.H3.D17,L9.H3.D17@5,L3.H2")
    parts = (Head(3, 2), FFNNeuron(9, 12), AttnNeuron(9, 3, 17), AttnNeuron(9, 3, 17, 5))
    assert zeroed == Zeroed(parts) and len(zeroed) == 4
    assert Zeroed.parse(str(zeroed)) == zeroed
    assert as_zeroed(zeroed) is zeroed
    assert as_zeroed(["L3.H2,L9.N12", *parts[2:]]) == zeroed == as_zeroed(str(zeroed))
    assert as_zeroed(parts[0]) == Zeroed(parts[:1])
    assert str(Zeroed()) == "nothing" and len(as_zeroed([])) == 0


@pytest.mark.parametrize("labels", ["", "L3", "L3.H2,", "L3.X2", "L3.H2.N5", "3.2", "L3.N2@1"])
def test_what_is_no_label_is_refused(labels):
    with pytest.raises(InputError, match=r"label must look like 'L9.H3', 'L9.N1234'"):
        Zeroed.parse(labels)


@pytest.mark.parametrize("parts", [7, [7], [None], {"L3": 1}.values()])
def test_what_cannot_be_zeroed_is_refused(parts):
    with pytest.raises(InputError, match="can be changed, not"):
        as_zeroed(parts)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("L3.H0", "there is no head L3.H0: the model has 3 layers of 3 heads"),
        ("L0.H3", "there is no head L0.H3: the model has 3 layers of 3 heads"),
        ("L0.N96", "there is no neuron L0.N96: the model has 3 layers of 96 FFN neurons"),
        ("L0.H0.D8", "there is no neuron L0.H0.D8: the model has 3 layers of 3 heads of 8 dim"),
        ("L1.H0.D7@4", r"there is no neuron L1.H0.D7@4: .* source positions are 0 to 3"),
    ],
)
def test_parts_out_of_range_are_refused_before_the_forward_pass(
    tiny_gpt2, monkeypatch, label, message
):
    host = open_host(tiny_gpt2)
    prompt = asked(host, position=3)
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    for run in (capture_zeroed, zeroed_residuals):
        with pytest.raises(InputError, match=message):
            run(host, [prompt], [Zeroed.parse(label)])
    assert passes == []


def test_prompts_share_a_pass_by_length_and_number(tiny_gpt2, monkeypatch):
    host = open_host(tiny_gpt2)
    prompts = [asked(host, range(1, n + 1)) for n in (5, 2, 5, 3, 2)]
    assert [*batches(host, prompts)] == [[1, 4, 3, 0, 2]]
    monkeypatch.setattr(forward, "_TOKENS_AT_A_TIME", 10)
    assert [*batches(host, prompts)] == [[1, 4, 3], [0, 2]]
    monkeypatch.setattr(forward, "_TOKENS_AT_A_TIME", 1)
    assert [*batches(host, prompts)] == [[1], [4], [3], [0], [2]]


def test_a_mixture_of_experts_goes_through_in_as_many_parts_more_as_it_has_experts_beside():
    host = open_host(bridge_of("mixtral"))
    assert (host.experts_per_position, host.n_experts) == (2, 4)
    whole = forward.tokens_at_a_time(open_host(bridge_of("llama")), "ffn")
    assert 2 * forward.tokens_at_a_time(host, "ffn") == whole
    assert forward.tokens_at_a_time(host, "attn") == whole
