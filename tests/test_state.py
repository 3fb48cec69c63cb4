"""Every public call leaves all as it was, exceptions included; what watches over it can fail."""

import inspect
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import TOKENS, WATCHED, bridge_of, bundled_model, look_at, own_bridge_of, watched
from typer.testing import CliRunner

import tl_neuron_attr as tlna
from tl_neuron_attr import NeuronAttrError, cli
from tl_neuron_attr.state import changed, model_state, random_states, torch_modes, weights_digest

# --- every public call ------------------------------------------------------------------------

# What takes a model, a host or a result: a call that works, and one that raises (None: no way to).
CALLS = {
    "attribute": (
        lambda model: tlna.attribute(model, TOKENS, top=3),
        lambda model: tlna.attribute(model, [10**6]),
    ),
    "attribute_all": (
        lambda model: tlna.attribute_all(model, [TOKENS, TOKENS[:3]], top=3),
        lambda model: tlna.attribute_all(model, [TOKENS, [-1]]),
    ),
    "attribute_answer": (
        lambda model: tlna.attribute_answer(model, TOKENS, [3, 5], top=3),
        lambda model: tlna.attribute_answer(model, TOKENS, [10**6]),
    ),
    "check_host": (
        lambda model: tlna.check_host(model, tlna.HOST_CHECKS[:4], prompt=TOKENS),
        lambda model: tlna.check_host(model, prompt=[-1]),
    ),
    "check_model": (
        lambda model: tlna.check_model(model, TOKENS, copy_limit=0),
        lambda model: tlna.check_model(model, []),
    ),
    "edit_weights": (
        lambda model: tlna.edit_weights(model, tlna.zero("L0.N1")).undo(),
        lambda model: tlna.edit_weights(model, tlna.zero("L99.N1")),
    ),
    "intervened": (
        lambda model: _inside(tlna.intervened(model, tlna.zero("L0.N1"))),
        lambda model: _inside(tlna.intervened(model, tlna.zero("L0.N1")), raising=True),
    ),
    "intervention_hooks": (
        lambda model: tlna.intervention_hooks(model, tlna.zero("L0.N1")),
        lambda model: tlna.intervention_hooks(model, tlna.zero("L99.N1")),
    ),
    "mean_coefficients": (
        lambda model: tlna.mean_coefficients(model, [TOKENS]),
        lambda model: tlna.mean_coefficients(model, [[-1]]),
    ),
    "open_host": (tlna.open_host, lambda model: tlna.open_host("tiny-facts")),
    "plan": (
        lambda model: tlna.plan(model, n_tokens=5),
        lambda model: tlna.plan(model, n_tokens=10**6),
    ),
    "projection_index": (
        lambda model: tlna.projection_index(model, _scratch()),
        lambda model: tlna.projection_index(model, __file__),
    ),
    "a hook that raises": (
        None,
        lambda model: _with_a_hook_that_raises(model),
    ),
    "query, cards, comparisons": (lambda model: _of_a_result(model), None),
}
# They take a model too.
ELSEWHERE = {
    "evaluate": "below, on the bundled model",
    "known_prompts": "below, on the bundled model",
    "run_prompts": "loads a model of its own",
}


def _inside(context, *, raising=False):
    with context:
        if raising:
            raise NeuronAttrError("inside")


def _scratch():
    import tempfile

    return tempfile.mkdtemp()


def _with_a_hook_that_raises(model):
    def fail(activation, hook):
        raise NeuronAttrError("from a hook of the user's")

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", fail)]):
        tlna.attribute(model, TOKENS, top=3)


def _of_a_result(model):
    found = tlna.attribute(model, TOKENS, top=5)
    other = tlna.attribute(model, TOKENS[::-1], target=found.target.id, top=5)
    found.query_neurons(3)
    found.positions()
    found.log_probs()
    found.head_scan()
    found.facts()
    tlna.neuron_card(found, found.ffn_neurons.neurons()[0])
    tlna.compare(found, other)
    tlna.compare(found, ["L0.H0"])
    tlna.value_query_graph(found)
    tlna.mask_curve(found, found.ffn_neurons, (1, 3))


@pytest.fixture(params=[torch.enable_grad, torch.no_grad], ids=["recording", "no_grad"])
def grad_mode(request):
    return request.param


EDITS = pytest.mark.changes("the weights")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[EDITS] * (name == "edit_weights")) for name in CALLS]
)
def test_a_public_call_leaves_all_alone_and_so_does_one_that_raises(name, tiny_gpt2, grad_mode):
    works, raises = CALLS[name]
    # editing, and undoing it, counts as two edits of the weights
    model = own_bridge_of("gpt2") if name == "edit_weights" else tiny_gpt2
    for call, raising in ((works, False), (raises, True)):
        if call is None:
            continue
        with grad_mode():
            before = model_state(model), torch_modes(), random_states()
            digest = weights_digest(model)
            if raising:
                with pytest.raises(NeuronAttrError):
                    call(model)
            else:
                call(model)
            after = model_state(model), torch_modes(), random_states()
        left = [name for pair in zip(before, after, strict=True) for name in changed(*pair)]
        if name == "edit_weights" and not raising:
            left.remove("the weights")
        assert left == []
        assert weights_digest(model) == digest


def test_no_public_call_that_takes_a_model_is_forgotten():
    taking = {
        name
        for name in tlna.__all__
        if inspect.isfunction(getattr(tlna, name))
        and "model" in inspect.signature(getattr(tlna, name)).parameters
    }
    assert taking - set(CALLS) - set(ELSEWHERE) == set()


def test_calls_on_the_bundled_model_leave_all_alone():
    model, prompts = bundled_model(), tlna.load_prompts("capital")[:2]
    with watched(model):
        tlna.known_prompts(model, prompts)
        tlna.evaluate(model, prompts, methods=["a"], top=[3], filtered=False)


# --- what watches can fail --------------------------------------------------------------------

SPOILING = (
    ("the weights", "with torch.no_grad(): next(model.parameters()).add_(0.0)"),
    ("the weights", "with torch.no_grad(): next(model.buffers()).add_(0.0)"),
    ("requires_grad", "next(model.parameters()).requires_grad_(False)"),
    ("the gradients (.grad)", "p = next(model.parameters()); p.grad = torch.zeros_like(p)"),
    ("the hooks", "model.hook_dict['blocks.0.hook_resid_pre'].add_hook(lambda v, hook: None)"),
    ("the modules' own hooks", "model.blocks[0].register_forward_hook(lambda *_: None)"),
    ("the modules' own hooks", "model.blocks[0].register_forward_pre_hook(lambda *_: None)"),
    ("the modules' own hooks", "model.blocks[0].register_full_backward_hook(lambda *_: None)"),
    ("the modules' own hooks", "model.blocks[0].register_full_backward_pre_hook(lambda *_: None)"),
    ("training mode", "model.blocks[0].train()"),
    ("the modules' forward", "model.blocks[0].forward = lambda *_: None"),
    ("the flags of its configuration", "model.cfg.use_attn_result = True"),
    ("the flags of its configuration", "model.original_model.config.architectures = ['Other']"),
    ("the flags of its configuration", "model.original_model.config.rope_parameters['x'] = 1"),
    ("the gradient mode", "torch.set_grad_enabled(False)"),
    ("the default dtype", "torch.set_default_dtype(torch.float64)"),
    ("the default device", "torch.set_default_device('meta')"),
    ("the precision of float32 products", "torch.set_float32_matmul_precision('medium')"),
    ("the number of threads", "torch.set_num_threads(torch.get_num_threads() + 1)"),
    ("deterministic algorithms", "torch.use_deterministic_algorithms(True)"),
    ("the search for anomalies", "torch.autograd.set_detect_anomaly(True)"),
    (
        "the hooks on all modules",
        "torch.nn.modules.module.register_module_forward_hook(lambda *_: None)",
    ),
    ("torch's random numbers", "torch.rand(1)"),
    ("numpy's random numbers", "import numpy; numpy.random.rand()"),
)


@contextmanager
def restored():
    """What some of these spoil, put back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    numbers = torch.get_rng_state(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.autograd.set_detect_anomaly(False)
        torch.nn.modules.module._global_forward_hooks.clear()
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_rng_state(numbers[0])
        np.random.set_state(numbers[1])


def test_an_edit_behind_torchs_back_changes_the_digest():
    for held in ("parameters", "buffers"):
        model = own_bridge_of("llama")
        before, digest = model_state(model), weights_digest(model)
        next(getattr(model, held)()).data.view(-1)[0] += 1
        assert changed(before, model_state(model)) == ()
        assert weights_digest(model) != digest


@pytest.mark.parametrize(("what", "spoil"), SPOILING)
def test_the_fixture_fails_a_test_that_leaves_something_behind(what, spoil):
    with restored():
        with pytest.raises(AssertionError, match=re.escape(f"the test changed {what}")):
            with watched(model := own_bridge_of("llama")):
                exec(spoil, {"model": model, "torch": torch})


def test_the_fixture_sees_an_edit_behind_torchs_back():
    with pytest.raises(AssertionError, match="the bytes of the weights"):
        with watched(model := own_bridge_of("gpt2")):
            model.blocks[0].mlp.W_out.data[0, 0] += 1


def test_the_fixture_sees_models_that_no_fixture_made():
    """Whatever the package opens, however it came to it: here one that nobody named."""
    model = own_bridge_of("gpt2")
    with pytest.raises(AssertionError, match="the test changed training mode"):
        with watched():
            tlna.attribute(model, TOKENS, top=1)
            model.train()


def test_what_a_test_changes_on_purpose_it_says_and_nothing_else_may_change():
    model = own_bridge_of("gpt2")
    with watched(model, except_for=["training mode"]):
        model.train()
    with pytest.raises(AssertionError, match=r"the test changed requires_grad\n"):
        with watched(model, except_for=["training mode"]):
            model.eval()
            model.requires_grad_(False)


def test_a_model_for_all_tests_may_not_be_left_changed_whatever_the_test_says():
    model = bridge_of("gpt2", seed=99)
    with pytest.raises(AssertionError, match="training mode of a model for all tests"):
        with watched(model, except_for=["training mode"]):
            model.train()
    model.eval()
    WATCHED.looks[model] = look_at(model)


def test_the_bundled_model_of_commands_and_runs_is_watched(tmp_path):
    def ask():
        shown = CliRunner().invoke(cli.app, ["attribute", "The capital of France is", "--top", "2"])
        assert shown.exit_code == 0, shown.output

    model = bundled_model()
    with watched():
        ask()
    with pytest.raises(AssertionError, match="the test changed the hooks"):
        with watched():
            ask()
            model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda value, hook: None)
    model.reset_hooks()
    WATCHED.looks[model] = look_at(model)


def test_the_fixture_watches_every_test(request):
    assert "all_is_left_alone" in request.fixturenames
