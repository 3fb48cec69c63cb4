"""Devices that are not there: torch as it is with several GPUs, on the CPU alone.

Inside ``fake_devices()`` every tensor says that it is on ``cpu`` or on some ``cuda:N``. The numbers
are the CPU's and are computed there, so that a model spread over fake devices gives, bit for bit,
what it gives on one. What torch refuses of real devices is refused: operations on tensors of two
devices (all but 0-dimensional ones of the CPU), an index on another device than the CPU or that of
what is indexed, and numpy of what is not on the CPU. Copies between devices are real copies, and
are counted.

It is a ``TorchFunctionMode``: it sees every call that Python makes, and what such a call does
inside. Functions of torch that are written in Python are checked as a whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

_INDEXED = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_INDEXED |= {torch.Tensor.index_put_, torch.Tensor.index_put, torch.index_put}
_STRICT = {torch.cat, torch.stack, torch.concat, torch.hstack, torch.vstack}


@dataclass
class Copy:
    """One tensor that was copied from a device to another."""

    source: torch.device
    target: torch.device
    place: int
    """Where the storage it is of begins: that of a weight, if (a part of) a weight was moved."""
    bytes: int


@dataclass
class FakeDevices(TorchFunctionMode):
    """The mode, and every copy between devices that was made in it."""

    copies: list[Copy] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        device = kwargs.pop("device", None)
        device = None if device is None else _real(device)
        if func in _INDEXED:
            here = _check_index(func, args)
        else:
            here = _common(func, [*_tensors(args), *_tensors(kwargs)])
        out = func(*args, **kwargs)
        return _tagged(out, device or here)

    def moved(self, tensor, device, *, dtype=None, copy=False):
        """A copy of ``tensor`` on ``device``, or the tensor itself if it is there."""
        if device is None or device == device_of(tensor):
            return _tagged(tensor.to(dtype or tensor.dtype, copy=copy), device_of(tensor))
        self.note(tensor, device)
        return _tagged(tensor.to(dtype or tensor.dtype, copy=True), device)

    def note(self, tensor, device):
        place = tensor.untyped_storage().data_ptr()
        size = tensor.numel() * tensor.element_size()
        self.copies.append(Copy(device_of(tensor), device, place, size))


@contextmanager
def fake_devices() -> Iterator[FakeDevices]:
    """All tensors made inside have a device, whatever there is."""
    make = torch.Tensor._make_subclass

    def parameter(cls, data, *args, **kwargs):  # the one way to a tensor that no mode sees
        return _tagged(make(cls, data, *args, **kwargs), device_of(data))

    with mock.patch.object(torch.Tensor, "_make_subclass", parameter), FakeDevices() as mode:
        yield mode


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is, by its tag; without one on the CPU."""
    return getattr(tensor, "_fake_device", CPU)


def put(module: torch.nn.Module, device: str) -> None:
    """The weights and buffers of a module, from now on there."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor._fake_device = _real(device)


def take_back(module: torch.nn.Module) -> None:
    """All of them are on the CPU again."""
    for tensor in [*module.parameters(), *module.buffers()]:
        vars(tensor).pop("_fake_device", None)


def _real(device):
    """``device`` with its index."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _tagged(out, device):
    if device is not None:
        for tensor in _tensors(out):
            tensor._fake_device = device
    return out


def _common(func, tensors):
    """The one device of an operation's tensors; 0-dimensional ones of the CPU go with any."""
    strict = func in _STRICT
    devices = {device_of(each) for each in tensors if strict or each.ndim or device_of(each) != CPU}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{names}! (when checking {getattr(func, '__name__', func)})"
        )
    return next(iter(devices), None) or (CPU if tensors else None)


def _check_index(func, args):
    indexed, index, *rest = args
    here = device_of(indexed)
    for each in _tensors(index):
        if each.ndim and device_of(each) not in (CPU, here):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor "
                f"({here})"
            )
    # plain slices are filled by a copy; what an index picks is not
    picked = any(each.ndim for each in _tensors(index))
    for value in _tensors(rest):
        if picked and device_of(value) != here and (value.ndim or device_of(value) != CPU):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{here} and {device_of(value)}! (when checking {func.__name__})"
            )
    return here


# --- functions that know of devices -----------------------------------------------------------


def _device(mode, func, args, kwargs):
    return device_of(args[0])


def _make_device(mode, func, args, kwargs):
    return _real(args[0]) if isinstance(args[0], int) else func(*args, **kwargs)


def _to(mode, func, args, kwargs):
    tensor, *rest = args
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for each in [*rest, kwargs.get("other")]:
        if isinstance(each, torch.Tensor):
            device, dtype = device_of(each), each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, (str, int, torch.device)) and not isinstance(each, bool):
            device = each
    device = None if device is None else _real(device)
    return mode.moved(tensor, device, dtype=dtype, copy=kwargs.get("copy", False))


def _copy(mode, func, args, kwargs):
    target, source = args[:2]
    if device_of(target) != device_of(source):
        mode.note(source, device_of(target))
    return func(*args, **kwargs)


def _cpu(mode, func, args, kwargs):
    return mode.moved(args[0], CPU)


def _cuda(mode, func, args, kwargs):
    return mode.moved(args[0], _real(args[1] if len(args) > 1 else "cuda"))


def _is_cuda(mode, func, args, kwargs):
    return device_of(args[0]).type == "cuda"


def _get_device(mode, func, args, kwargs):
    return -1 if device_of(args[0]) == CPU else device_of(args[0]).index


def _numpy(mode, func, args, kwargs):
    if device_of(args[0]) != CPU:
        raise TypeError(
            f"can't convert {device_of(args[0])} device type tensor to numpy. Use Tensor.cpu() to "
            "copy the tensor to host memory first."
        )
    return func(*args, **kwargs)


def _set_data(mode, func, args, kwargs):
    func(*args, **kwargs)
    args[0]._fake_device = device_of(args[1])


def _gradients(mode, func, args, kwargs):
    found = func(*args, **kwargs)
    inputs = args[1] if len(args) > 1 else kwargs["inputs"]
    for gradient, tensor in zip(found, _tensors([inputs]), strict=True):
        _tagged(gradient, device_of(tensor))
    return found


_SPECIAL = {
    torch.device: _make_device,
    torch.Tensor.device.__get__: _device,
    torch.Tensor.is_cuda.__get__: _is_cuda,
    torch.Tensor.get_device: _get_device,
    torch.Tensor.to: _to,
    torch.Tensor.copy_: _copy,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.data.__set__: _set_data,
    torch.autograd.grad: _gradients,
}
