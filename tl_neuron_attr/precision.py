"""Products in the dtype of their factors, whatever the caller chose for his own work."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


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
        for device in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
