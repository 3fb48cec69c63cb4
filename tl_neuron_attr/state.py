"""What is left alone: a model's weights, hooks and flags, torch's modes, random numbers.

Every public call leaves these as they were, exceptions included. A state here is plain facts by the
name of what they are of: two of them are compared, and the names of what differs are what to say.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = Mapping[str, Any]
"""Facts to compare, by what they are of, in words."""


def model_state(model: Any) -> State:
    """What of a model must not change: cheap, for no weight is read.

    An edit in place is known by torch's count of them, so one that goes behind its back
    (``weight.data[0] = 1``) is not seen: ``weights_digest`` sees it.
    """
    weights = [*model.parameters(), *model.buffers()]
    modules = [*model.modules()]
    return {
        "the weights": [
            (tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version)
            for tensor in weights
        ],
        "requires_grad": [weight.requires_grad for weight in weights],
        "the gradients (.grad)": [
            None if weight.grad is None else (id(weight.grad), weight.grad._version)
            for weight in model.parameters()
        ],
        "the hooks": {
            name: (len(point.fwd_hooks), len(point.bwd_hooks))
            for name, point in model.hook_dict.items()
        },
        "the modules' own hooks": [
            tuple(
                sum(map(foreign, hooks.values()))
                for hooks in (
                    module._forward_hooks,
                    module._forward_pre_hooks,
                    module._backward_hooks,
                    module._backward_pre_hooks,
                )
            )
            for module in modules
        ],
        "training mode": [module.training for module in modules],
        "the modules' forward": [id(vars(module).get("forward")) for module in modules],
        "the flags of its configuration": _flags(model),
    }


def computed_by(model: Any) -> int:
    """A number that changes with how the model computes, whatever its weights: in this process.

    Of forward methods that somebody put in place of a module's own, and of every setting.
    """
    forwards = tuple(id(vars(module).get("forward")) for module in model.modules())
    return hash((forwards, tuple(_flags(model).items())))


def foreign(hook: Any) -> bool:
    """Whether a hook is somebody's, and not part of how the host works."""
    return not str(getattr(hook, "__module__", "")).startswith(_WIRED)


def weights_digest(model: Any) -> str:
    """A hash of the bytes of every weight and buffer. Cost: one pass over them."""
    digest = hashlib.sha256()
    for weight in (*model.parameters(), *model.buffers()):
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def torch_modes() -> State:
    """What torch does everywhere, by the user's choice."""
    return {
        "the gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "the default dtype": torch.get_default_dtype(),
        "the default device": str(torch.get_default_device()),
        "the precision of float32 products": torch.get_float32_matmul_precision(),
        "the number of threads": torch.get_num_threads(),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "the search for anomalies": (
            torch.is_anomaly_enabled(),
            torch.is_anomaly_check_nan_enabled(),
        ),
        "the hooks on all modules": tuple(
            tuple(getattr(torch.nn.modules.module, name)) for name in _EVERYWHERE
        ),
        "autocast": tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
    }


def random_states(devices: Iterable[torch.device] = ()) -> State:
    """Where the global random numbers of torch and numpy are; torch's on GPUs too.

    Not Python's own: beartype draws from them to choose which items of a list it looks at.
    """
    numpy_state = np.random.get_state(legacy=True)
    return {
        "torch's random numbers": torch.get_rng_state().numpy().tobytes(),
        "numpy's random numbers": tuple(
            part.tobytes() if isinstance(part, np.ndarray) else part for part in numpy_state
        ),
        **{
            f"torch's random numbers on {device}": torch.cuda.get_rng_state(device)
            .numpy()
            .tobytes()
            for device in devices
            if device.type == "cuda"
        },
    }


def changed(before: State, after: State) -> tuple[str, ...]:
    """The names of what is no longer what it was."""
    return tuple(name for name, was in before.items() if after.get(name) != was)


@contextmanager
def put_back(model: Any) -> Iterator[None]:
    """Afterwards torch's modes, all random states and the hooks are as before, whatever was raised.

    For what others wrote. Of the model nothing else is put back: ``changed`` tells of it.
    """
    modes = torch_modes()
    gradients, inference = modes["the gradient mode"]
    of_python, of_numpy = random.getstate(), np.random.get_state(legacy=True)
    cards = {each.device for each in model.parameters() if each.device.type == "cuda"}
    points = [(point, *map(list, _handles(point))) for point in model.hook_dict.values()]
    tables = [(table, dict(table)) for table in _hook_tables(model)]
    try:
        # the one way out of an inference mode that somebody entered and did not leave
        with torch.random.fork_rng(cards), torch.inference_mode(inference):
            with torch.set_grad_enabled(gradients):
                yield
    finally:
        np.random.set_state(of_numpy)
        for name in changed(modes, torch_modes()):
            if name in _SETTERS:
                _SETTERS[name](modes[name])
        for point, forward, backward in points:
            for now, were in zip(_handles(point), (forward, backward), strict=True):
                for handle in now:
                    if handle not in were:
                        handle.hook.remove()
            point.fwd_hooks, point.bwd_hooks = forward, backward
        for table, were in tables:
            wired = {key: hook for key, hook in table.items() if not foreign(hook)}
            table.clear()
            table.update(were | wired)
        random.setstate(of_python)  # last: beartype, where tests run, draws from them


def _set_default_device(name: str) -> None:
    torch.set_default_device(None)
    if str(torch.get_default_device()) != name:
        torch.set_default_device(name)


# How a mode is put back; those of gradients have a context, and hooks a table of their own.
_SETTERS: Mapping[str, Callable[[Any], Any]] = {
    "the default dtype": torch.set_default_dtype,
    "the default device": _set_default_device,
    "the precision of float32 products": torch.set_float32_matmul_precision,
    "the number of threads": torch.set_num_threads,
    "deterministic algorithms": lambda was: torch.use_deterministic_algorithms(
        was[0], warn_only=was[1]
    ),
    "the search for anomalies": lambda was: torch.set_anomaly_enabled(*was),
    "autocast": lambda was: [
        torch.set_autocast_enabled(device, on)
        for device, on in zip(("cpu", "cuda"), was, strict=True)
    ],
}


def _handles(point: Any) -> tuple[list[Any], list[Any]]:
    """TransformerLens's hooks at a point: of the forward and of the backward pass."""
    return point.fwd_hooks, point.bwd_hooks


def _hook_tables(model: Any) -> Iterator[dict[int, Any]]:
    """Where torch keeps hooks: those of each module, and those of all there are."""
    for module in model.modules():
        yield from (module._forward_hooks, module._forward_pre_hooks)
        yield from (module._backward_hooks, module._backward_pre_hooks)
    for name in _EVERYWHERE:
        yield getattr(torch.nn.modules.module, name)


# Where torch keeps hooks that act on every module there is.
_EVERYWHERE = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)

# Who wires hooks of its own into a model when it is made or first runs, and leaves them there.
_WIRED = ("transformers.", "transformer_lens.model_bridge.", "transformer_lens.hook_points")


def _flags(model: Any) -> dict[str, Any]:
    """The settings of its configurations: TransformerLens's and Hugging Face's.

    Lists and mappings as they are written, for they change in place.
    """
    configs = (model.cfg, getattr(getattr(model, "original_model", None), "config", None))
    flags = {
        f"{place}.{name}": value if isinstance(value, _PLAIN) else repr(value)
        for place, config in enumerate(configs)
        if config is not None
        for name, value in vars(config).items()
        if isinstance(value, (*_PLAIN, *_WRITTEN))
    }
    return flags | {"compatibility_mode": vars(model).get("compatibility_mode")}


_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_WRITTEN = (list, tuple, dict, set)
