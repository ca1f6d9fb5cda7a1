"""What torch says when memory runs out, as the engine's own exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvasir.worker.engine.step import OutOfMemory


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
