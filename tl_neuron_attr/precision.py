"""Products in the dtype of their factors, whatever the caller chose for his own work."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda", "mps")


def is_full_precision() -> bool:
    """Whether products are in the dtype of their factors by the caller's own choice."""
    autocast = any(torch.is_autocast_enabled(device) for device in _DEVICES)
    return torch.get_float32_matmul_precision() == "highest" and not autocast


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in the dtype of their factors, whatever the caller chose for his own.

    Under autocast, or with TensorFloat-32 in place of float32, scores would not be what they say,
    and no bound would hold. The caller's choice is back afterwards.
    """
    chosen = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        if chosen != "highest":
            stack.callback(torch.set_float32_matmul_precision, chosen)
            torch.set_float32_matmul_precision("highest")
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
