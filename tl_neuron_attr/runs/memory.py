"""A batch that does not fit into memory: tried once more with what is cached given back."""

import gc
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from tl_neuron_attr.errors import DeviceMemoryError
from tl_neuron_attr.runs.settings import RunSettings

T = TypeVar("T")

# torch raises OutOfMemoryError on CUDA, and RuntimeError elsewhere
_SAID = re.compile("out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
_NUMBERS = re.compile(
    r"Tried to allocate [\d.]+ \w+|total capacity of [\d.]+ \w+|[\d.]+ \w+ is free"
)


def within_memory(compute: Callable[[], T], lengths: Sequence[int], settings: RunSettings) -> T:
    """What ``compute`` gives for a batch of prompts of these lengths, in tokens.

    Where memory runs out the caches are emptied and it is tried once more: between batches of
    other shapes the allocator may have kept most of it, in pieces.

    Raises:
        DeviceMemoryError: If it runs out again.
    """
    try:
        return compute()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # here, where the error and with it the frames that held its tensors are gone
    give_back()
    try:
        return compute()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = _sentence(error, lengths, settings)
    give_back()
    raise DeviceMemoryError(message)


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that memory ran out, on whichever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


def give_back() -> None:
    """What nothing refers to any more goes back to the devices, for other processes too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sentence(error: Exception, lengths: Sequence[int], settings: RunSettings) -> str:
    numbers = ", ".join(each[0].lower() + each[1:] for each in _NUMBERS.findall(str(error)))
    said = f" ({numbers})" if numbers else ""
    size = len(lengths)
    batch = f"a batch of {size} prompts of up to" if size > 1 else "one prompt of"
    what = f"{batch} {max(lengths):,} tokens does not fit into the device's memory{said}"
    if size == 1:
        return f"{what}; free some, take a larger device, or leave such prompts out"
    return (
        f"{what}; free some, or start another run with --batch-size {size // 2}, or with --budget "
        f"{settings.budget // 2} (now {settings.budget}), in another directory, for batches decide "
        "the last bits of scores"
    )
