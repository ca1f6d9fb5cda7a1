"""Copies to a device and back that nothing waits for, and what torch says when its memory runs out, as the engine's
own exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kvasir.worker.engine.step import OutOfMemory


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return `values` on `device`. On CUDA the copy is queued behind the work there, and nothing waits for it.

    Every other way to make a tensor there from Python's numbers waits until all that was queued before is computed.
    """
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def copy_to(target: Tensor, values: NDArray[Any]) -> None:
    """Write `values` to the beginning of `target`, as `to_device` does."""
    host = torch.from_numpy(values)
    target[: len(values)].copy_(host.pin_memory() if target.device.type == "cuda" else host, non_blocking=True)


class Readback:
    """A small tensor on its way from a device. `wait` waits for it, and for nothing that was queued behind it."""

    def __init__(self, values: Tensor) -> None:
        self._host, self.event = values, None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self.event.record()

    def wait(self) -> list[Any]:
        """Return the values as Python's numbers."""
        if self.event is not None:
            self.event.synchronize()
        return self._host.tolist()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise `OutOfMemory` where the body fails for want of memory, on a GPU or in the allocator of the CPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not is_memory:
            raise
        raise OutOfMemory((str(error).splitlines() or ["out of memory"])[0][:200]) from None
