"""What waits for a worker of one model: a queue per tenant, taken from in turn.

The core asks only `pop`, so that a weighted scheduler can take this class's place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from math import inf

from kvasir.gateway.core.request import Request


class TenantQueue:
    """The tenant with the fewest requests running is next, in turn among equals; within it first come, first served.

    However many requests one tenant has waiting or running, another's next one waits for at most one of each tenant.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, OrderedDict[bytes, Request]] = OrderedDict()  # by tenant, the next turn first
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        """All waiting requests, tenant by tenant. The queue must not change meanwhile."""
        for requests in self._waiting.values():
            yield from requests.values()

    def __contains__(self, request: Request) -> bool:
        return request.submit.req_id in self._waiting.get(request.submit.tenant_id, ())

    def push(self, request: Request) -> None:
        """Append `request` to its tenant's queue."""
        tenant_id = request.submit.tenant_id
        if tenant_id not in self._waiting:
            self._waiting[tenant_id] = OrderedDict()
        self._waiting[tenant_id][request.submit.req_id] = request
        self._num_waiting += 1

    def push_front(self, request: Request) -> None:
        """Put `request` before everything of its tenant: it has had its turn, and its worker was lost.

        A tenant with nothing else waiting goes to the head of the turns for the same reason.
        """
        tenant_id = request.submit.tenant_id
        is_new = tenant_id not in self._waiting
        self.push(request)
        self._waiting[tenant_id].move_to_end(request.submit.req_id, last=False)
        if is_new:
            self._waiting.move_to_end(tenant_id, last=False)

    def pop(self, num_running: Mapping[str, int] | None = None, max_context: float = inf) -> Request | None:
        """Take the next request, None when no tenant's first one fits. Its tenant goes to the end of the turns.

        `num_running`: of each tenant. Tenants whose first request needs more than `max_context` keep their turns.
        O(tenants).
        """
        running = num_running or {}
        found, fewest = None, inf
        for tenant_id, requests in self._waiting.items():
            num = running.get(tenant_id, 0)
            if num < fewest and (first := next(iter(requests.values()))).num_needed <= max_context:
                found, fewest = first, num
        if found is not None:
            self._waiting.move_to_end(found.submit.tenant_id)
            self.remove(found)
        return found

    def remove(self, request: Request) -> None:
        """Take out `request`, which waits here. O(1)."""
        tenant_id = request.submit.tenant_id
        requests = self._waiting[tenant_id]
        del requests[request.submit.req_id]
        self._num_waiting -= 1
        if not requests:
            del self._waiting[tenant_id]

    def check_integrity(self) -> None:
        """Assert that queues and the count agree."""
        assert all(self._waiting.values()), "a tenant without waiting requests is kept"
        assert self._num_waiting == sum(map(len, self._waiting.values())), "the count is off"
