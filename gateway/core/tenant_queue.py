"""What waits for a worker of one model: a queue per tenant, taken from in turn.

The core asks only `pop`, so that a weighted scheduler can take this class's place.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from kvasir.gateway.core.request import Request


class TenantQueue:
    """Round robin over tenants that have something waiting; within a tenant first come, first served.

    However many requests one tenant has waiting, another's next one waits for at most one of each tenant.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, OrderedDict[bytes, Request]] = {}  # only tenants that have something waiting
        self._turns: deque[str] = deque()  # the same tenants, the next one first
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        """All waiting requests, tenant by tenant. The queue must not change meanwhile."""
        for requests in self._waiting.values():
            yield from requests.values()

    def num_waiting(self, tenant_id: str) -> int:
        """Return how many requests of `tenant_id` wait."""
        return len(self._waiting.get(tenant_id, ()))

    def push(self, request: Request) -> None:
        """Append `request` to its tenant's queue."""
        self._of(request.submit.tenant_id)[request.submit.req_id] = request
        self._num_waiting += 1

    def push_front(self, request: Request) -> None:
        """Put `request` before everything of its tenant: it has had its turn, and its worker was lost.

        A tenant with nothing else waiting goes to the head of the turns for the same reason.
        """
        tenant_id = request.submit.tenant_id
        if tenant_id not in self._waiting:
            self._waiting[tenant_id] = OrderedDict()
            self._turns.appendleft(tenant_id)
        requests = self._waiting[tenant_id]
        requests[request.submit.req_id] = request
        requests.move_to_end(request.submit.req_id, last=False)
        self._num_waiting += 1

    def pop(self) -> Request | None:
        """Take the next request, None when nothing waits. Its tenant goes to the end of the turns."""
        if not self._turns:
            return None
        tenant_id = self._turns.popleft()
        requests = self._waiting[tenant_id]
        _, request = requests.popitem(last=False)
        if requests:
            self._turns.append(tenant_id)
        else:
            del self._waiting[tenant_id]
        self._num_waiting -= 1
        return request

    def remove(self, request: Request) -> None:
        """Take out `request`, which waits here. O(1), but for the last one of a tenant: O(tenants)."""
        tenant_id = request.submit.tenant_id
        requests = self._waiting[tenant_id]
        del requests[request.submit.req_id]
        self._num_waiting -= 1
        if not requests:
            del self._waiting[tenant_id]
            self._turns.remove(tenant_id)

    def check_integrity(self) -> None:
        """Assert that turns, queues and the count agree."""
        assert len(self._turns) == len(set(self._turns)), "a tenant has two turns"
        assert set(self._turns) == set(self._waiting), "a waiting tenant has no turn, or the other way round"
        assert all(self._waiting.values()), "a tenant without waiting requests is kept"
        assert self._num_waiting == sum(map(len, self._waiting.values())), "the count is off"

    def _of(self, tenant_id: str) -> OrderedDict[bytes, Request]:
        requests = self._waiting.get(tenant_id)
        if requests is None:
            requests = self._waiting[tenant_id] = OrderedDict()
            self._turns.append(tenant_id)
        return requests
