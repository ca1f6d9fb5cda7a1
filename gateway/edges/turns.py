"""What takes long, for all tenants: one that floods the gateway with it is waited for by itself alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

T = TypeVar("T")


class Turns:
    """Up to `num_each` at a time for each tenant. Who waits longest is next."""

    def __init__(self, num_each: int) -> None:
        self._num_each = num_each
        self._turns: dict[str, trio.CapacityLimiter] = {}  # of tenants that have or wait for one

    def __len__(self) -> int:
        """Return how many tenants have a turn or wait for one."""
        return len(self._turns)

    def num_waiting(self, tenant_id: str) -> int:
        """Return how many wait for a turn of this tenant's."""
        turn = self._turns.get(tenant_id)
        return 0 if turn is None else turn.statistics().tasks_waiting

    @asynccontextmanager
    async def of(self, tenant_id: str) -> AsyncIterator[None]:
        """Wait for a turn of this tenant's, and have it."""
        turn = self._turns.get(tenant_id)
        if turn is None:
            turn = self._turns[tenant_id] = trio.CapacityLimiter(self._num_each)
        try:
            async with turn:
                yield
        finally:
            if not turn.borrowed_tokens and not turn.statistics().tasks_waiting:
                self._turns.pop(tenant_id, None)


class FairThreads:
    """Up to `num` threads at a time. One tenant may have all of them, but no more of it waits before another's."""

    def __init__(self, num: int) -> None:
        self._threads = trio.CapacityLimiter(num)
        self._turns = Turns(num)

    async def run(self, tenant_id: str, function: Callable[..., T], *args: object) -> T:
        """Return `function(*args)`, from a thread. Cancelled, it returns at once; the thread ends later by itself."""
        async with self._turns.of(tenant_id):
            return await trio.to_thread.run_sync(function, *args, limiter=self._threads, abandon_on_cancel=True)
