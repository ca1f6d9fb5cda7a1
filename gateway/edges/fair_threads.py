"""Threads for what takes long, shared by all tenants: one that floods them is waited for by itself alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


class FairThreads:
    """Up to `num` threads at a time, of them `num_each` for one tenant. Who waits longest is next."""

    def __init__(self, num: int, num_each: int) -> None:
        self._threads = trio.CapacityLimiter(num)
        self._num_each = num_each
        self._turns: dict[str, trio.CapacityLimiter] = {}  # of tenants that run or wait

    async def run(self, tenant_id: str, function: Callable[..., T], *args: object) -> T:
        """Return `function(*args)`, from a thread. Cancelled, it returns at once; the thread ends later by itself."""
        turn = self._turns.get(tenant_id)
        if turn is None:
            turn = self._turns[tenant_id] = trio.CapacityLimiter(self._num_each)
        try:
            async with turn:
                return await trio.to_thread.run_sync(function, *args, limiter=self._threads, abandon_on_cancel=True)
        finally:
            if not turn.borrowed_tokens and not turn.statistics().tasks_waiting:
                self._turns.pop(tenant_id, None)
