"""Every method conforms; whatever is no method is told what is wrong with it."""

import random

import numpy as np
import pytest
import torch
from conftest import TOKENS, own_bridge_of
from test_methods import case_of

from tl_neuron_attr import Case, ConformanceError, InputError, check_method
from tl_neuron_attr.methods import METHOD_CHECKS, METHODS, example_cases
from tl_neuron_attr.methods.static import coefficient, norm
from tl_neuron_attr.state import put_back, random_states, torch_modes


@pytest.fixture(scope="module")
def cases():
    model = own_bridge_of("llama")
    return tuple(case_of(model, tokens) for tokens in (TOKENS[:3], TOKENS[:4]))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_conforms(cases, name):
    slow = name in ("ablation", "attribution_patching", "integrated_gradients", "value_and_query")
    check_method(METHODS[name], cases[:1] if slow else cases)


def test_a_user_s_own_function_is_checked_on_the_bundled_model():
    def loudest(case, kind, top):
        return coefficient(case, kind) / norm(case, kind)

    check_method(loudest)


def test_the_checks_can_be_run_one_by_one_on_the_examples():
    cases = example_cases()
    assert len({len(case.result.captured.prompt.tokens) for case in cases}) == 2
    assert all(case.corrupted is not None for case in cases)
    for check in METHOD_CHECKS:
        check(METHODS["direct_logit"], cases)


# --- what is no method ------------------------------------------------------------------------


def scores(case, kind):
    return coefficient(case, kind)


def flat(case, kind, top):
    return scores(case, kind).flatten()


def other_shape(case, kind, top):
    return scores(case, kind)[:, :-1]


def a_list(case, kind, top):
    return scores(case, kind).tolist()


def integers(case, kind, top):
    return (100 * scores(case, kind)).long()


def half(case, kind, top):
    return scores(case, kind).half()


def nan(case, kind, top):
    return scores(case, kind).log().sqrt()


def minus_infinity(case, kind, top):
    return scores(case, kind).masked_fill(scores(case, kind) < 0.01, -torch.inf)


def hanging_on_a_graph(case, kind, top):
    with torch.enable_grad():
        return scores(case, kind).requires_grad_() * 2


def the_case_s_own(case, kind, top):
    captured = case.result.captured
    return captured.mlp_post if kind == "ffn" else captured.z


def wrong_arguments(case, kind):
    return scores(case, kind)


def failing(case, kind, top):
    raise KeyError("no such layer")


def never(case, kind, top):
    raise InputError("not today")


def training(case, kind, top):
    case.result.host.model.train()
    return scores(case, kind)


def hooking(case, kind, top):
    model = case.result.host.model
    model.blocks[0].register_forward_hook(lambda *_: None)
    return scores(case, kind)


def editing(case, kind, top):
    with torch.no_grad():
        case.result.host.model.blocks[0].mlp.W_out.mul_(1.0)
    return scores(case, kind)


def gathering_gradients(case, kind, top):
    model = case.result.host.model
    with torch.enable_grad():
        model(torch.tensor([TOKENS])).sum().backward()
    return scores(case, kind)


def freezing(case, kind, top):
    for weight in case.result.host.model.parameters():
        weight.requires_grad_(not weight.requires_grad)
    return scores(case, kind)


def switching_gradients_off(case, kind, top):
    torch.set_grad_enabled(False)
    return scores(case, kind)


def in_float64_from_now_on(case, kind, top):
    torch.set_default_dtype(torch.float64)
    return scores(case, kind)


def drawing(case, kind, top):
    return torch.rand_like(scores(case, kind))


OWN_GENERATOR = torch.Generator().manual_seed(0)


def drawing_on_its_own(case, kind, top):
    like = scores(case, kind)
    return torch.rand(like.shape, generator=OWN_GENERATOR)


def writing(case, kind, top):
    case.result.captured.mlp_post.clamp_(min=0)
    return scores(case, kind)


def best_of_another_order(case, kind, top):
    found = scores(case, kind)
    return found if top is None else -found


def best_by_other_numbers(case, kind, top):
    found = scores(case, kind)
    return found if top is None else 2 * found


def too_few(case, kind, top):
    found = scores(case, kind)
    if top is None:
        return found
    return found.masked_fill(found < found.max(), -torch.inf)


def by_gradient_mode(case, kind, top):
    return scores(case, kind) + float(torch.is_grad_enabled())


def by_batch(case, kind, top):
    # a batch pads prompts, and what is timed together is timed otherwise
    return scores(case, kind) + case.result.seconds


def refusing_the_best(case, kind, top):
    if top is not None:
        raise InputError("all or nothing")
    return scores(case, kind)


def infinite_best(case, kind, top):
    found = scores(case, kind)
    return found if top is None else found + torch.inf


def elsewhere(case, kind, top):
    return torch.empty_like(scores(case, kind), device="meta")


def in_more_threads(case, kind, top):
    torch.set_num_threads(torch.get_num_threads() + 1)
    return scores(case, kind)


def drawing_for_the_best(case, kind, top):
    return scores(case, kind) if top is None else 0 * drawing(case, kind, top) + scores(case, kind)


def hooking_for_the_best(case, kind, top):
    return scores(case, kind) if top is None else hooking(case, kind, top)


def hooking_then_refusing(case, kind, top):
    if kind == "ffn":
        return scores(case, kind)
    hooking(case, kind, top)
    raise InputError("this is for FFN neurons")


def editing_behind_torch_s_back(case, kind, top):
    case.result.host.model.blocks[0].mlp.W_out.data.mul_(1.0000001)
    return scores(case, kind)


def writing_into_the_result(case, kind, top):
    case.result.ffn_neurons.score.add_(1)
    return scores(case, kind)


def writing_into_layers(case, kind, top):
    case.result.layer_scores.ffn.zero_()
    return scores(case, kind)


@pytest.mark.changes(
    *("training mode", "the weights", "the bytes of the weights"),
    *("the gradients (.grad)", "requires_grad"),
)
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (flat, r"scores of shape \[\d+\]; give \[3, .*which is \[layer, d_mlp\]"),
        (other_shape, r"scores of shape"),
        (a_list, "gives a list; give a torch tensor"),
        (integers, "scores in torch.int64; give torch.float32"),
        (half, "scores in torch.float16"),
        (nan, "scores that are NaN or infinite"),
        (minus_infinity, "scores that are NaN or infinite"),
        (hanging_on_a_graph, "require gradients; detach them"),
        (the_case_s_own, "a tensor of the case or of the model itself; clone it"),
        (wrong_arguments, r"raises TypeError when called with \(case, 'ffn', None\)"),
        (failing, "raises KeyError when called .*should raise InputError"),
        (never, r"raises InputError for every case and kind \(not today\)"),
        (training, "changes training mode of the model"),
        (hooking, "changes the modules' own hooks of the model"),
        (editing, "changes the weights of the model"),
        (gathering_gradients, r"changes the gradients \(.grad\) of the model"),
        (freezing, "changes requires_grad of the model"),
        (switching_gradients_off, "changes the gradient mode of torch"),
        (in_float64_from_now_on, "changes the default dtype of torch"),
        (drawing, "draws from torch's random numbers, which are everybody's"),
        (drawing_on_its_own, "other scores of ffn neurons when it is called a second time"),
        (writing, "writes into the tensors of the case"),
        (best_of_another_order, "with top=1 does not give the 1 best ffn neurons"),
        (best_by_other_numbers, "with top=1 does not give the 1 best ffn neurons"),
        (too_few, "with top=10 does not give the 10 best ffn neurons"),
        (refusing_the_best, "raises InputError with top=1, but not without: all or nothing"),
        (infinite_best, "gives NaN or infinity with top=1; others may be -inf, no more"),
        (elsewhere, "gives scores on meta; give them where the case is, on cpu"),
        (in_more_threads, "changes .*threads.* of torch"),
        (drawing_for_the_best, "draws from torch's random numbers, which are everybody's"),
        (hooking_for_the_best, "changes the modules' own hooks of the model"),
        (hooking_then_refusing, "changes the modules' own hooks of the model"),
        (editing_behind_torch_s_back, r"changes the weights of the model \(through .data, say\)"),
        (writing_into_the_result, "writes into the tensors of the case"),
        (writing_into_layers, "writes into the tensors of the case"),
        (by_gradient_mode, "where gradients are recorded than under no_grad"),
        (by_batch, "another score where the prompt was attributed in a batch"),
    ],
)
def test_what_is_no_method_is_told_why(method, message):
    model = own_bridge_of("gpt2")
    cases = [case_of(model, tokens) for tokens in (TOKENS, TOKENS[:4])]
    with pytest.raises(ConformanceError, match=message) as raised:
        check_method(method, cases)
    assert str(raised.value).startswith(method.__name__)


LEFT_OPEN = []


def inference_mode_left_on(model):
    LEFT_OPEN.append(torch.inference_mode())
    LEFT_OPEN[-1].__enter__()


GLOBAL_CHANGES = {
    "the gradient mode": lambda _: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "inference mode": inference_mode_left_on,
    "the default dtype": lambda _: torch.set_default_dtype(torch.float64),
    "the default device": lambda _: torch.set_default_device("meta"),
    "the precision of float32 products": lambda _: torch.set_float32_matmul_precision("medium"),
    "the number of threads": lambda _: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic algorithms": lambda _: torch.use_deterministic_algorithms(True, warn_only=True),
    "the search for anomalies": lambda _: torch.autograd.set_detect_anomaly(True),
    "the hooks on all modules": lambda _: torch.nn.modules.module.register_module_forward_hook(
        lambda *_: None
    ),
    "autocast": lambda _: torch.set_autocast_enabled("cpu", True),
    "torch's random numbers": lambda _: torch.rand(1),
    "numpy's random numbers": lambda _: np.random.rand(),
    "a hook on a module": lambda model: model.blocks[0].register_forward_hook(lambda *_: None),
    "a hook at a point": lambda model: model.hook_dict["blocks.0.hook_resid_pre"].add_hook(
        lambda value, hook: None
    ),
    "no hooks at a point": lambda model: model.hook_dict["blocks.1.hook_resid_pre"].remove_hooks(
        "fwd", including_permanent=True
    ),
}


@pytest.mark.parametrize("raising", [None, InputError])
@pytest.mark.parametrize("what", GLOBAL_CHANGES)
def test_what_a_method_changed_everywhere_is_put_back(what, raising, with_a_hook):
    def method(case, kind, top):
        GLOBAL_CHANGES[what](case.result.host.model)
        if raising is not None:
            raise raising("not today")
        return scores(case, kind)

    model = with_a_hook.result.host.model
    before = all_that_is_put_back(model)
    for check in METHOD_CHECKS:
        try:
            check(method, [with_a_hook])
        except (ConformanceError, InputError):
            pass
        after = all_that_is_put_back(model)
        assert [name for name, was in before.items() if after[name] != was] == []
    with torch.inference_mode(False):  # whose end puts back what a guard's own end changes
        LEFT_OPEN.clear()


def test_python_s_random_numbers_are_put_back_too(cases):
    # around the call alone: beartype, where tests run, draws from them
    kept = random.getstate()
    with put_back(cases[0].result.host.model):
        random.random()
    assert random.getstate() == kept


@pytest.fixture(scope="module")
def with_a_hook():
    """A case of a model that has a hook, which must stay."""
    model = own_bridge_of("gpt2")
    point = model.hook_dict["blocks.1.hook_resid_pre"]
    point.add_hook(lambda value, hook: None, is_permanent=True)
    return case_of(model, TOKENS[:3])


def all_that_is_put_back(model):
    return {
        **torch_modes(),
        **random_states(),
        "tables": [
            list(table)
            for module in model.modules()
            for table in (module._forward_hooks, module._backward_hooks)
        ],
        "points": [list(point.fwd_hooks) for point in model.hook_dict.values()],
    }


def test_a_method_for_one_kind_alone_conforms(cases):
    def of_ffn(case, kind, top):
        if kind != "ffn":
            raise InputError("this is for FFN neurons")
        return coefficient(case, kind)

    check_method(of_ffn, cases)


def test_what_cannot_be_called_is_no_method(cases, unchecked):
    with pytest.raises(ConformanceError, match="a method is a function of .*, got 3; pass the fun"):
        check_method(3, cases)


def test_there_must_be_something_to_check(cases):
    with pytest.raises(InputError, match="there are no cases"):
        check_method(METHODS["norm"], [])


@pytest.mark.parametrize("given", [[1], 1, "ab"])
def test_what_is_no_case_is_refused(given, unchecked):
    for check in (check_method, *METHOD_CHECKS):
        with pytest.raises(InputError, match=r"a list of cases, each a Case\(.*; got (1|'a')$"):
            check(METHODS["norm"], given)


def test_cases_may_come_one_by_one(cases):
    check_method(METHODS["norm"], iter(cases))
    for check in METHOD_CHECKS[:3]:
        check(METHODS["norm"], (case for case in cases))


def test_a_case_without_corrupted_prompt_is_passed_over(cases):
    (first, second) = cases
    check_method(METHODS["attribution_patching"], [Case(result=first.result), second])
