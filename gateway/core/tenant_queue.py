"""What waits for the workers of one model: a queue per tenant, and whose turn it is.

Virtual token counters (VTC, Sheng et al., OSDI 2024): a tenant is charged for what is computed for it, and the one that
was charged least is next. A tenant that comes with nothing waiting or being computed starts where the least charged of
the others is, so that idleness earns no credit. However much one tenant has waiting, another's next request waits only
for what that tenant was charged less.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import islice

from kvasir.gateway.core.request import Request

LOOKS = 4
"""So many of a tenant's requests may be sent next: when one waits for its worker, those behind it may go elsewhere."""


class TenantQueue:
    """First come, first served within a tenant. Also knows which worker a request waits for, if it has chosen one."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, OrderedDict[bytes, Request]] = OrderedDict()  # by tenant, the last served last
        self._num_waiting = 0
        self._charged: dict[str, float] = {}
        self._num_computing: Counter[str] = Counter()  # requests on workers whose prompts are not computed yet
        self._num_held: Counter[str] = Counter()  # by worker

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
            self._enter(tenant_id)
            self._waiting[tenant_id] = OrderedDict()
            self._waiting.move_to_end(tenant_id, last=False)  # before those that were charged the same, and served
        self._waiting[tenant_id][request.submit.req_id] = request
        self._num_waiting += 1

    def push_front(self, request: Request) -> None:
        """Put `request` before everything of its tenant: it has had its turn, and its worker was lost."""
        self.push(request)
        self._waiting[request.submit.tenant_id].move_to_end(request.submit.req_id, last=False)

    def turns(self) -> Iterator[Request]:
        """Yield the requests that may be sent next, in turn: the first few of each tenant.

        The one yielded last may be removed and its tenant charged: then the turns go on with whoever is least charged.
        """
        turns = [(self._charged[tenant_id], turn, tenant_id) for turn, tenant_id in enumerate(self._waiting)]
        heapq.heapify(turns)
        num_turns = len(turns)
        while turns:
            _, _, tenant_id = heapq.heappop(turns)
            for request in list(islice(self._waiting.get(tenant_id, {}).values(), LOOKS)):
                if request in self:
                    yield request
                if request not in self:
                    if tenant_id in self._waiting:
                        num_turns += 1
                        heapq.heappush(turns, (self._charged[tenant_id], num_turns, tenant_id))
                    break

    def remove(self, request: Request) -> None:
        """Take out `request`, which waits here. O(1)."""
        tenant_id = request.submit.tenant_id
        requests = self._waiting[tenant_id]
        del requests[request.submit.req_id]
        self._num_waiting -= 1
        self.hold(request, "")
        if requests:
            self._waiting.move_to_end(tenant_id)
        else:
            del self._waiting[tenant_id]

    # ---- charges -------------------------------------------------------------------------------------------------

    def computing(self, tenant_id: str) -> None:
        """Note that a request of the tenant is on its way to a worker: it is active until `computed`."""
        self._num_computing[tenant_id] += 1

    def computed(self, tenant_id: str) -> None:
        """Note that its prompt is computed, or not wanted any more."""
        self._num_computing[tenant_id] -= 1
        if not self._num_computing[tenant_id]:
            del self._num_computing[tenant_id]

    def charge(self, tenant_id: str, num_tokens: float) -> None:
        """Charge a tenant, or, less than 0, give back what it was charged too much."""
        self._charged[tenant_id] = self._charged.get(tenant_id, 0.0) + num_tokens

    def lead(self, tenant_id: str) -> float:
        """Return how many tokens more the tenant, which is active, was charged than the active one charged least."""
        if self.is_alone(tenant_id):
            return 0.0
        return self._charged[tenant_id] - min([self._charged[other] for other in self._active()])

    def is_alone(self, tenant_id: str) -> bool:
        """Return whether no other tenant has anything waiting or being computed."""
        waiting, computing = self._waiting, self._num_computing
        return len(waiting) == (tenant_id in waiting) and len(computing) == (tenant_id in computing)

    # ---- holds ---------------------------------------------------------------------------------------------------

    def hold(self, request: Request, worker_id: str) -> None:
        """Note that the waiting `request` waits for `worker_id` to have room; empty: for none."""
        if request.held_for:
            self._num_held[request.held_for] -= 1
            if not self._num_held[request.held_for]:
                del self._num_held[request.held_for]
        request.held_for = worker_id
        if worker_id:
            self._num_held[worker_id] += 1

    def num_held(self, worker_id: str) -> int:
        """Return how many requests wait for that worker."""
        return self._num_held[worker_id]

    def check_integrity(self) -> None:
        """Assert that queues and counts agree."""
        assert all(self._waiting.values()), "a tenant without waiting requests is kept"
        assert self._num_waiting == sum(map(len, self._waiting.values())), "the count is off"
        assert self._num_held == Counter(request.held_for for request in self if request.held_for), "holds leak"
        assert all(count > 0 for count in self._num_computing.values())
        assert self._charged.keys() >= self._active()

    def _active(self) -> set[str]:
        return self._waiting.keys() | self._num_computing.keys()

    def _enter(self, tenant_id: str) -> None:
        """Lift what a tenant was charged to the least of the active ones, or of all if there are none."""
        charged = self._charged.get(tenant_id, 0.0)
        active = self._active()
        if tenant_id in active:
            return
        others = [self._charged[other] for other in active]
        self._charged[tenant_id] = max(charged, min(others) if others else max(self._charged.values(), default=0.0))
