"""Interventions in force: what each does to coefficients, where, in what order, for how long."""

import contextlib
import subprocess
import sys

import pytest
import torch
from conftest import TOKENS, bridge_of, hooked_of, needs_hooked_transformer, own_bridge_of
from hypothesis import given
from hypothesis import strategies as st

from tl_neuron_attr import (
    AttnNeuron,
    Clamped,
    FFNNeuron,
    Head,
    IdentityError,
    InputError,
    MeanCoefficients,
    MeanReplaced,
    NonFiniteError,
    Prompt,
    Scaled,
    Zeroed,
    attribute,
    capture_zeroed,
    clamp,
    compare,
    intervened,
    intervention_hooks,
    mean_coefficients,
    open_host,
    replace_mean,
    scale,
    tokenize,
    zero,
)
from tl_neuron_attr.hook_points import hook_names, pattern_is_late

PARTS = "L0.N3,L1.N7,L1.H2,L2.H0.D4,L0.H1.D5"
LATE = ("gptj", "neo", "opt")


def run(model, interventions=(), tokens=TOKENS):
    """The logits with interventions on, which the two ways of running them agree about."""
    with torch.no_grad():
        with intervened(model, interventions):
            inside = model(torch.tensor([tokens]))
        return inside[0]


def run_hooks(model, hooks=(), tokens=TOKENS):
    with torch.no_grad():
        return model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=list(hooks))[0]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def edited_by_hand(host, edits):
    """Hooks of ``(part, position or None, function of one number)``, each on its numbers alone."""

    def edit(activation, hook, *, part, position, change):
        activation = activation.clone()
        if isinstance(part, FFNNeuron):
            places = (part.index,)
        elif isinstance(part, Head):
            places = (part.head,)
        else:
            places = (part.head, part.index)
        at = (slice(None), slice(None) if position is None else position, *places)
        activation[at] = change(activation[at])
        return activation

    def bound(part, position, change):
        name = hook_names(host, part.layer)["mlp_post" if isinstance(part, FFNNeuron) else "z"]
        return name, lambda a, hook: edit(a, hook, part=part, position=position, change=change)

    return [bound(*one) for one in edits]


# --- what leaves the model as it is -----------------------------------------------------------


def test_what_does_nothing_changes_no_logit(any_model):
    plain = run_hooks(any_model)
    sources = "L0.H1.D5@2,L2.H0.D1@0,L1.H2.D3@5"
    for nothing in (
        (),
        zero([]),
        scale(PARTS, 1.0),
        scale(PARTS, 1.0, position=3),
        scale(sources, 1.0, position=-1),
        clamp(PARTS, low=-1e9, high=1e9),
        clamp(sources, low=-1e9, position=5),
    ):
        assert torch.equal(run(any_model, nothing), plain)


def test_neurons_held_at_their_own_coefficients_change_no_logit(any_model):
    means = mean_coefficients(any_model, [TOKENS], positions="read")
    every = [Head(1, head) for head in range(open_host(any_model).n_heads)]
    every += [FFNNeuron(1, index) for index in range(open_host(any_model).d_mlp)]
    held = run(any_model, replace_mean(every, means, position=-1))
    assert torch.equal(held, run_hooks(any_model))
    # elsewhere the coefficients are others
    assert not torch.equal(run(any_model, replace_mean(every, means)), run_hooks(any_model))


# --- what each does ---------------------------------------------------------------------------


def test_each_intervention_is_the_edit_of_each_coefficient_by_hand(any_model):
    host = open_host(any_model)
    parts = zero(PARTS).parts
    means = mean_coefficients(any_model, [(9, 2, 30), TOKENS])
    assert torch.equal(run(any_model, scale(PARTS, 0.0)), run(any_model, zero(PARTS)))
    for position in (None, 3):
        for intervention, change in (
            (zero(PARTS, position=position), lambda part: torch.zeros_like),
            (scale(PARTS, -1.5, position=position), lambda part: lambda x: x * -1.5),
            (clamp(PARTS, low=-0.1, high=0.2, position=position),
             lambda part: lambda x: x.clamp(-0.1, 0.2)),
            (clamp(PARTS, high=0.0, position=position), lambda part: lambda x: x.clamp(max=0.0)),
            (replace_mean(PARTS, means, position=position), lambda part: mean_of(part, means)),
        ):  # fmt: skip
            hooks = edited_by_hand(host, [(part, position, change(part)) for part in parts])
            wanted = run_hooks(any_model, hooks)
            found = run_hooks(any_model, intervention_hooks(host, intervention))
            assert torch.equal(found, wanted)
            assert not torch.equal(found, run_hooks(any_model))
            if position is None or not pattern_is_late(host):
                assert torch.equal(run(any_model, intervention), wanted)
            else:  # edited in what attention writes
                close(run(any_model, intervention), wanted)


def mean_of(part, means):
    of = means.ffn if isinstance(part, FFNNeuron) else means.z
    place = {
        FFNNeuron: lambda: (part.layer, part.index),
        Head: lambda: (part.layer, part.head),
        AttnNeuron: lambda: (part.layer, part.head, part.index),
    }[type(part)]()
    return lambda x: of[place].expand_as(x)


def test_one_position_changes_nothing_earlier(any_model):
    plain = run_hooks(any_model)
    for intervention in (zero(PARTS, position=3), zero("L0.H1.D5@1,L1.H0.D2@3", position=3)):
        found = run(any_model, intervention)
        assert torch.equal(found[:3], plain[:3])
        assert (found[3:] - plain[3:]).abs().amax(1).min() > 0
        assert torch.equal(
            run(any_model, type(intervention)(intervention.parts, position=3 - len(TOKENS))), found
        )


def test_a_source_position_is_taken_out_of_what_the_head_gathered_there(any_model):
    """As ``capture_zeroed`` does, which takes another way, at layers that feed each other."""
    host = open_host(any_model)
    parts = zero("L0.H1.D5@2,L1.H2.D0@4,L1.H2.D0@1,L2.H0.D1@0,L2.H0,L1.N3")
    sources = Zeroed(tuple(p for p in parts.parts if getattr(p, "source_pos", None) is not None))
    for read_pos, zeroed in ((5, sources), (4, sources)):
        prompt = tokenize(host, Prompt(tokens=TOKENS, position=read_pos))
        (captured,) = capture_zeroed(host, [prompt], [zeroed])
        found = run(any_model, zero(zeroed.parts, position=read_pos))
        torch.testing.assert_close(
            found[read_pos].log_softmax(-1), captured.logits.log_softmax(-1), rtol=0, atol=2e-5
        )
    # of what is zeroed altogether at that position nothing is left, whatever its sources were
    both = run(any_model, zero("L1.H2,L1.H2.D0@4", position=5))
    torch.testing.assert_close(both, run(any_model, zero("L1.H2", position=5)), rtol=0, atol=1e-5)


def test_all_sources_together_are_the_neuron(any_model):
    neuron = [f"L1.H2.D3@{source}" for source in range(5)]
    for make in (zero, lambda parts, **where: scale(parts, 2.5, **where)):
        torch.testing.assert_close(
            run(any_model, make(neuron, position=4)),
            run(any_model, make("L1.H2.D3", position=4)),
            rtol=0,
            atol=1e-5,
        )


def test_the_pattern_is_late_where_the_host_says_so(any_model):
    host, seen = open_host(any_model), []
    names = hook_names(host, 1)
    hooks = [
        (names[kind], lambda a, hook, kind=kind: seen.append(kind)) for kind in ("pattern", "z")
    ]
    run_hooks(any_model, hooks)
    assert pattern_is_late(host) == (seen == ["z", "pattern"])
    parts = zero("L1.H2.D0@4", position=5)
    if pattern_is_late(host):
        with pytest.raises(InputError, match=r"use intervened\(model"):
            intervention_hooks(host, parts)
    else:
        found = run_hooks(any_model, intervention_hooks(host, parts))
        assert torch.equal(found, run(any_model, parts))


def test_grouped_heads_are_changed_one_at_a_time(any_model):
    """Two query heads that share their values: zeroing the one leaves ``z`` of the other."""
    host, seen = open_host(any_model), {}
    with torch.no_grad(), intervened(any_model, [zero("L1.H1"), zero("L1.H0.D2@1", position=4)]):
        any_model.run_with_hooks(
            torch.tensor([TOKENS]),
            fwd_hooks=[(hook_names(host, 1)["z"], lambda z, hook: seen.update(z=z[0]))],
        )
    (captured,) = capture_zeroed(host, [tokenize(host, Prompt(tokens=TOKENS))], [Zeroed()])
    assert not seen["z"][:, 1].any() or pattern_is_late(host)
    torch.testing.assert_close(seen["z"][5, 0], captured.z[1, 0])
    torch.testing.assert_close(seen["z"][5, 2], captured.z[1, 2])


# --- several ----------------------------------------------------------------------------------

labels = st.sampled_from(
    ["L0.N3", "L0.N4,L0.N3", "L1.N7", "L1.H2", "L1.H2.D3,L2.H0", "L2.H0.D4", "L0.H1", "L1.H2.D4"]
)
positions = st.sampled_from([None, 0, 2, -1])
numbers = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])
makers = st.sampled_from(["zero", "scale", "clamp", "mean"])


def made(maker, parts, position, first, second, means):
    if maker == "zero":
        return zero(parts, position=position)
    if maker == "scale":
        return scale(parts, first, position=position)
    if maker == "clamp":
        return clamp(parts, low=min(first, second), high=max(first, second), position=position)
    return replace_mean(parts, means, position=position)


@given(several=st.lists(st.tuples(makers, labels, positions, numbers, numbers), max_size=5))
def test_several_act_one_after_the_other_in_the_order_given(tiny_gpt2, some_means, several):
    host, means = open_host(tiny_gpt2), some_means
    several = [made(*each, means) for each in several]

    def change(intervention, part):
        if isinstance(intervention, Zeroed):
            return torch.zeros_like
        if isinstance(intervention, Scaled):
            return lambda x: x * intervention.factor
        if isinstance(intervention, Clamped):
            return lambda x: x.clamp(intervention.low, intervention.high)
        return mean_of(part, means)

    hooks = edited_by_hand(
        host,
        [(part, each.position, change(each, part)) for each in several for part in each.parts],
    )
    wanted = run_hooks(tiny_gpt2, hooks)
    assert torch.equal(run(tiny_gpt2, several), wanted)
    with contextlib.ExitStack() as stack:
        for each in several:
            stack.enter_context(intervened(tiny_gpt2, each))
        nested = run_hooks(tiny_gpt2)
    assert torch.equal(nested, wanted)


@pytest.fixture(scope="module")
def some_means(tiny_gpt2):
    return mean_coefficients(tiny_gpt2, [TOKENS, (9, 2, 30)])


def test_sources_come_before_the_head_they_are_part_of(tiny_model):
    source = "L1.H2.D3@2"
    tripled = [scale(source, 3.0, position=5), scale("L1.H2", 2.0)]
    torch.testing.assert_close(run(tiny_model, tripled), run(tiny_model, tripled[::-1]))
    # two of the same source: one after the other, also where positions are named differently
    twice = [scale(source, 2.0, position=5), zero(source, position=-1)]
    torch.testing.assert_close(run(tiny_model, twice), run(tiny_model, zero(source, position=5)))


def test_a_batch_is_changed_at_the_same_place_of_each_row(any_model):
    rows = [TOKENS, TOKENS[::-1]]
    for intervention in (
        [zero(PARTS), scale(PARTS, 2.0, position=2)],
        clamp("L1.H2.D0@1,L1.H0.D2@0", low=0.0, position=-2),
    ):
        with torch.no_grad(), intervened(any_model, intervention):
            batch = any_model(torch.tensor(rows))
        for found, tokens in zip(batch, rows, strict=True):
            alone = run(any_model, intervention, tokens)
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


# --- for how long -----------------------------------------------------------------------------


def hooks_on(model):
    found = {}
    for name, point in model.hook_dict.items():
        found[name] = [id(handle) for handle in point.fwd_hooks]
    modules = [len(module._forward_hooks) for module in model.modules()]
    return found, modules


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_only_its_own_hooks_are_taken_away(family):
    model = own_bridge_of(family)
    seen = []
    name = hook_names(open_host(model), 0)["mlp_post"]
    model.add_hook(name, lambda activation, hook: seen.append(float(activation[0, 0, 3])))
    before = hooks_on(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        with intervened(model, [zero("L0.N3"), zero("L1.H0.D2@1", position=4)]):
            assert hooks_on(model) != before
            run_hooks(model)
            raise RuntimeError("on purpose")
    assert hooks_on(model) == before
    run_hooks(model)
    assert len(seen) == 2 and seen[0] == seen[1] != 0.0  # theirs came first
    model.reset_hooks()


def test_hooks_that_come_and_go_inside_leave_it_in_force(tiny_model):
    wanted = run(tiny_model, zero(PARTS))
    seen = []
    name = hook_names(open_host(tiny_model), 1)["mlp_post"]
    with intervened(tiny_model, zero(PARTS)):
        with tiny_model.hooks(fwd_hooks=[(name, lambda a, hook: seen.append(float(a[0, 0, 7])))]):
            assert torch.equal(run_hooks(tiny_model), wanted)
        tiny_model.reset_hooks()
        assert torch.equal(run_hooks(tiny_model), wanted)
        _, cache = tiny_model.run_with_cache(torch.tensor([TOKENS]))
        assert not cache[name][0, :, 7].any() and cache[name][0, :, 6].all()
    assert seen == [0.0]
    assert not torch.equal(run_hooks(tiny_model), wanted)


def test_blocks_may_end_in_any_order(tiny_model):
    first, second = intervened(tiny_model, zero("L0.N3")), intervened(tiny_model, zero("L1.N7"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(run_hooks(tiny_model), run(tiny_model, zero("L1.N7")))
    second.__exit__(None, None, None)


def test_a_block_that_cannot_begin_leaves_no_hook(tiny_model, monkeypatch):
    before = hooks_on(tiny_model)
    point = tiny_model.hook_dict[hook_names(open_host(tiny_model), 1)["z"]]

    def failing(*arguments, **options):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(point, "add_hook", failing)
    with pytest.raises(RuntimeError, match="on purpose"), intervened(tiny_model, zero(PARTS)):
        pass
    assert hooks_on(tiny_model) == before


def test_gradients_pass_through(tiny_model):
    def gradient(interventions):
        resid = {}

        def leaf(activation, hook):
            resid["leaf"] = activation.detach().requires_grad_()
            return resid["leaf"]

        name = hook_names(open_host(tiny_model), 0)["resid_pre"]
        with intervened(tiny_model, interventions):
            logits = tiny_model.run_with_hooks(torch.tensor([TOKENS]), fwd_hooks=[(name, leaf)])
        return torch.autograd.grad(logits[0, -1, 9], resid["leaf"])[0]

    edited = [scale(PARTS, 2.0, position=2), zero("L1.H0.D2@1", position=4)]
    assert not torch.equal(gradient(edited), gradient(()))
    assert torch.equal(gradient(scale(PARTS, 1.0)), gradient(()))


# --- generation -------------------------------------------------------------------------------


def generated(model, interventions, *, cached):
    with intervened(model, interventions):
        return model.generate(
            torch.tensor([TOKENS]),
            max_new_tokens=4,
            do_sample=False,
            verbose=False,
            stop_at_eos=False,
            use_past_kv_cache=cached,
        )[0].tolist()


def test_generation_is_intervened_on_with_and_without_its_cache(any_model):
    host = open_host(any_model)
    strong = [Head(layer, head) for layer in range(3) for head in range(host.n_heads)]
    changed = 0
    for interventions in (
        zero(strong),
        scale([FFNNeuron(1, index) for index in range(host.d_mlp)], -4.0, position=5),
        scale(strong, -4.0, position=5),
    ):
        found = generated(any_model, interventions, cached=True)
        assert found == generated(any_model, interventions, cached=False)
        changed += found != generated(any_model, (), cached=True)
    assert changed


@pytest.mark.parametrize("family", ["gpt2", *LATE])
def test_what_a_source_carries_cannot_be_told_once_it_is_only_in_the_cache(family):
    model = bridge_of(family)
    ran = generated(model, zero("L1.H2.D3@2", position=5), cached=True)  # in the prompt's own call
    assert ran == generated(model, zero("L1.H2.D3@2", position=5), cached=False)
    with pytest.raises(InputError, match="what a source position carries cannot be told"):
        generated(model, zero("L1.H2.D3@2", position=-1), cached=True)


@pytest.mark.parametrize("family", LATE)
def test_a_late_pattern_does_not_let_the_positions_of_hooks_slip(family):
    model = bridge_of(family)
    hooks = intervention_hooks(model, zero("L1.H2", position=0))
    with model.hooks(fwd_hooks=hooks), pytest.raises(InputError, match="does not tell in time"):
        generated(model, (), cached=True)


# --- both classes -----------------------------------------------------------------------------


@needs_hooked_transformer
@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "qwen2", "neox-parallel", "gptj", "opt", "bloom"]
)
def test_both_classes_are_intervened_on_alike(family, processed):
    models = [bridge_of(family, processed=processed), hooked_of(family, processed=processed)]
    for made in (
        lambda model: [scale(PARTS, 2.0), clamp("L1.H0,L2.N1", low=-0.1, position=2)],
        lambda model: scale("L0.H1.D5@2,L1.H2.D0@4,L2.H0.D1@0", 3.0, position=-1),
        lambda model: replace_mean(PARTS, mean_coefficients(model, [TOKENS, (9, 2, 30)])),
    ):
        found = [run(model, made(model)).log_softmax(-1) for model in models]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        assert not torch.equal(found[0], run_hooks(models[0]).log_softmax(-1))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_folded_weights_are_intervened_on_once(family):
    model = bridge_of(family, processed=True)
    host = open_host(model)
    hooks = edited_by_hand(host, [(part, None, lambda x: x * 2) for part in zero(PARTS).parts])
    found = run(model, scale(PARTS, 2.0))
    assert torch.equal(found, run_hooks(model, hooks))
    assert torch.equal(found, run_hooks(model, intervention_hooks(model, scale(PARTS, 2.0))))
    assert not torch.equal(found, run(model, scale(PARTS, 4.0)))


# --- means ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["all", "read"])
def test_means_are_those_of_runs_one_at_a_time(any_model, which):
    host = open_host(any_model)
    prompts = [Prompt(tokens=TOKENS, position=3), Prompt(tokens=(9, 2, 30)), Prompt(tokens=(7,))]
    found = mean_coefficients(any_model, prompts, positions=which)
    kept = {"mlp_post": [], "z": []}
    for prompt in prompts:
        _, cache = any_model.run_with_cache(torch.tensor([prompt.tokens]))
        read = prompt.position % len(prompt.tokens)
        rows = slice(read + 1) if which == "all" else slice(read, read + 1)
        for name, each in kept.items():
            layers = [
                cache[hook_names(host, layer)[name]][0, rows] for layer in range(host.n_layers)
            ]
            each.append(torch.stack(layers, 1).double())
    assert found.n_positions == (8 if which == "all" else 3)
    for name, values in (("mlp_post", found.ffn), ("z", found.z)):
        wanted = torch.cat(kept[name]).mean(0)
        torch.testing.assert_close(values.double(), wanted, rtol=0, atol=1e-5)


def test_means_of_prompts_in_every_form(tiny_gpt2):
    host = open_host(tiny_gpt2)
    forms = ([TOKENS], TOKENS, torch.tensor([TOKENS]), Prompt(tokens=TOKENS))
    tokenized = tokenize(host, Prompt(tokens=TOKENS))
    wanted = mean_coefficients(host, [tokenized])
    for form in (*forms, tokenized, [TOKENS, TOKENS]):
        torch.testing.assert_close(mean_coefficients(tiny_gpt2, form).z, wanted.z)
    with pytest.raises(InputError, match="all tokenized, or none"):
        mean_coefficients(host, [tokenized, TOKENS])
    with pytest.raises(InputError, match="no prompts"):
        mean_coefficients(host, [])


def test_means_that_are_not_finite_are_refused():
    model = own_bridge_of("gpt2")
    with torch.no_grad():
        model.blocks[1].mlp.W_out[3] = torch.nan
    with pytest.raises(NonFiniteError, match="no mean"):
        mean_coefficients(model, [TOKENS])


# --- the values, and what is refused ----------------------------------------------------------


def test_interventions_are_values():
    assert zero("L1.H2, L0.N3,L1.H2") == Zeroed((Head(1, 2), FFNNeuron(0, 3)))
    assert scale(Head(1, 2), 2) == Scaled((Head(1, 2),), factor=2.0) != zero(Head(1, 2))
    assert len(clamp(["L1.H2", FFNNeuron(0, 3)], low=0)) == 2
    assert hash(zero("L1.H2", position=3)) != hash(zero("L1.H2"))
    assert [
        str(each)
        for each in (
            zero("L1.H2,L0.N3"),
            zero("L1.H2", position=3),
            scale("L1.H2", 0.5, position=-1),
            clamp("L1.H2", low=0),
            clamp("L0.N3", low=-1, high=2),
        )
    ] == [
        "L1.H2,L0.N3",
        "L1.H2 at position 3",
        "0.5 times L1.H2 at position -1",
        "within 0 and inf: L1.H2",
        "within -1 and 2: L0.N3",
    ]
    means = MeanCoefficients(ffn=torch.zeros(1, 2), z=torch.zeros(1, 2, 3), n_positions=1)
    assert str(MeanReplaced((Head(0, 1),), means=means)) == "the mean of L0.H1"
    assert scale("L1.H2", torch.tensor(2), position=torch.tensor(3)) == scale(
        "L1.H2", 2, position=3
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zero(zero("L1.H2")), r"got an intervention \(L1.H2\)"),
        (lambda: zero("L1.X2"), "cannot tell what to change: a head or neuron label must look"),
        (lambda: zero("L1.H2", position=True), "a position must be an integer, got True"),
        (lambda: scale("L1.H2", float("inf")), "a factor must be finite, got inf"),
        (lambda: clamp("L1.H2"), "a range needs an end: give low, high, or both"),
        (lambda: clamp("L1.H2", low=2, high=1), "low must not be above high, got 2 and 1"),
        (lambda: clamp("L1.H2", low=float("nan")), "a range must end at numbers, got nan and None"),
        (lambda: replace_mean("L1.H2.D1@3", _some_means()), "leave out @3"),
    ],
)  # fmt: skip
def test_what_is_no_intervention_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


WRONG_TYPES = """
import torch
from tl_neuron_attr import *
from tl_neuron_attr.interventions import as_zeroed

for make, message in (
    (lambda: Zeroed("L1.H2"), "got the text 'L1.H2'; read labels with zero('L1.H2')"),
    (lambda: Scaled("L1.H2", factor=1), "read labels with scale('L1.H2', ...)"),
    (lambda: Zeroed(Head(1, 2)), "got Head(layer=1, head=2); put it into a tuple"),
    (lambda: Zeroed(7), "got 7; put it into a tuple"),
    (lambda: Zeroed(("L1.H2",)), "a head or a neuron can be changed, not 'L1.H2'"),
    (lambda: Zeroed.parse(7), "labels must be text, like 'L3.H2,L9.N12', got 7"),
    (lambda: zero([FFNNeuron(0, 1.5)]), "a part's index must be an integer, got 1.5"),
    (lambda: zero([FFNNeuron(None, 1)]), "a part's layer must be an integer, got None"),
    (lambda: zero("L1.H2", position=1.5), "a position must be an integer, got 1.5"),
    (lambda: scale("L1.H2", "2"), "a factor must be a number, got '2'"),
    (lambda: scale("L1.H2", None), "a factor must be a number, got None"),
    (lambda: clamp("L1.H2", high="1"), "the range's high end must be a number, got '1'"),
    (lambda: replace_mean("L1.H2", 0.5), "got a float; measure them with mean_coefficients"),
):
    try:
        make()
    except InputError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
assert zero([FFNNeuron(torch.tensor(1), torch.tensor(2))]).parts == (FFNNeuron(1, 2),)
"""


def test_wrong_types_are_refused_where_types_are_not_checked():
    """As users run the package: these tests have every call's types checked, and stop before."""
    ran = subprocess.run([sys.executable, "-c", WRONG_TYPES], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def _some_means(layers=3, d_mlp=96):
    return MeanCoefficients(
        ffn=torch.zeros(layers, d_mlp), z=torch.zeros(layers, 3, 8), n_positions=1
    )


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        ("L1.H2", r"an intervention was expected, got 'L1.H2'; make one with zero"),
        (Head(1, 2), "an intervention was expected, got Head"),
        ([zero("L1.H2"), 3], "an intervention was expected, got 3"),
        (zero("L3.H0"), "there is no head L3.H0: the model has 3 layers of 3 heads"),
        (scale("L0.N96", 2), "there is no neuron L0.N96"),
        (zero("L1.H2", position=32), r"position 32 is out of range: the model's context is 32"),
        (zero("L1.H2.D1@3"), r"L1.H2.D1@3 is what is carried to one read position: .* position="),
        (zero("L1.H2.D1@4", position=3), "source positions are 0 to 3"),
        (zero("L1.H2.D1@32", position=-1), "source positions are 0 to 31"),
        (replace_mean("L1.H2", _some_means(layers=2)), "the means are of another model: ffn is of"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_forward_pass(tiny_gpt2, interventions, message):
    before = hooks_on(tiny_gpt2)
    with pytest.raises(InputError, match=message):
        intervention_hooks(tiny_gpt2, interventions)
    with pytest.raises(InputError, match=message), intervened(tiny_gpt2, interventions):
        raise AssertionError("not reached")
    assert hooks_on(tiny_gpt2) == before


def test_a_position_that_the_call_has_not_is_refused(tiny_gpt2):
    for position in (6, -7):
        beyond = zero("L1.N2", position=position)
        with pytest.raises(InputError, match=f"position {position} is out of range: there are 6"):
            intervention_hooks(tiny_gpt2, beyond, n_pos=6)
        with pytest.raises(InputError, match=f"position {position} is out of range: the call ends"):
            run(tiny_gpt2, beyond)
    with pytest.raises(InputError, match="source position 5 comes after the read position 4"):
        run(tiny_gpt2, zero("L1.H2.D1@5", position=-2))
    with pytest.raises(InputError, match="source positions are 0 to 4"):
        intervention_hooks(tiny_gpt2, zero("L1.H2.D1@5", position=-2), n_pos=6)
    # a pass that was broken off leaves nothing behind for the next
    run(tiny_gpt2, zero("L1.H2.D1@4", position=-2))


def test_rows_are_zeroed_at_all_positions_or_refused(tiny_gpt2):
    host = open_host(tiny_gpt2)
    with pytest.raises(InputError, match="L1.H2 at position 3 was given; leave out position"):
        capture_zeroed(host, [tokenize(host, Prompt(tokens=TOKENS))], [zero("L1.H2", position=3)])


def test_comparing_takes_zeroing_only(tiny_gpt2):
    result = attribute(tiny_gpt2, TOKENS, target=9, top=1)
    with pytest.raises(InputError, match="can only be zeroed, got 2 times L1.H2; .* intervened"):
        compare(result, scale("L1.H2", 2.0))
    with pytest.raises(InputError, match="L1.H2 at position 3 was given; leave out position"):
        compare(result, zero("L1.H2", position=3))
    assert compare(result, zero("L1.H2"), top=1).other.zeroed == Zeroed((Head(1, 2),))


def test_attributing_under_an_intervention_is_right_or_refused(tiny_model):
    """What attention writes is not what its pattern and values say then; the self-check sees."""
    with intervened(tiny_model, zero("L0.N3,L1.N7")):
        result = attribute(tiny_model, TOKENS, target=9, top=10**6)
    assert not result.captured.mlp_post[[0, 1], [3, 7]].any()
    with pytest.raises(IdentityError), intervened(tiny_model, zero("L1.H2")):
        attribute(tiny_model, TOKENS, target=9, top=1)
