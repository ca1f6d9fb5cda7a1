"""What waits for the workers of one model: a queue per tenant, and whose turn it is.

A tenant is charged for what is computed for it (virtual token counters, Sheng et al., OSDI 2024). The *fair charge* is
what a tenant would have been charged that always got an equal part of what is computed among those active (the virtual
time of weighted fair queueing). A tenant with nothing waiting is lifted to it: what it did not ask for is not saved.
One that got more has a *lead*, and waits for the others: whoever was charged least is next.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from kvasir.gateway.core.request import Request

LOOKS = 4
"""So many of a tenant's requests may be sent next: when one waits for its worker, those behind it may go elsewhere."""


class TenantQueue:
    """First come, first served within a tenant. Also knows which worker a request waits for, if it has chosen one."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[bytes, Request]] = {}  # by tenant
        self._num_waiting = 0
        self._last_turns: dict[
            str, int
        ] = {}  # by tenant: of those charged the same, the one served longest ago is next
        self._num_turns = 0
        self._charged: dict[str, float] = {}
        self._fair_charge = 0.0
        self._num_unfinished: dict[str, int] = {}  # requests that wait or whose prompts are not computed yet, by tenant
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
        own = self._waiting.get(tenant_id)
        if own is None:
            own = self._waiting[tenant_id] = {}
            self._charged[tenant_id] = max(self._charged.get(tenant_id, 0.0), self._fair_charge)
        own[request.submit.req_id] = request
        self._num_waiting += 1
        self._num_unfinished[tenant_id] = self._num_unfinished.get(tenant_id, 0) + 1

    def push_front(self, request: Request) -> None:
        """Put `request` before everything of its tenant: it has had its turn, and its worker was lost."""
        self.push(request)
        own = self._waiting[request.submit.tenant_id]
        others = [item for item in own.items() if item[1] is not request]
        own.clear()
        own[request.submit.req_id] = request
        own.update(others)

    def turns(self) -> Iterator[Request]:
        """Yield the requests that may be sent next, in turn: the first few of each tenant.

        The one yielded last may be removed and its tenant charged: then the turns go on with whoever is least charged.
        """
        waiting, charged, last = self._waiting, self._charged, self._last_turns
        turns = [(charged[tenant_id], last.get(tenant_id, 0), tenant_id) for tenant_id in waiting]
        heapq.heapify(turns)
        while turns:
            tenant_id = heapq.heappop(turns)[2]
            own = waiting.get(tenant_id, {})
            for request in list(islice(own.values(), LOOKS)):
                req_id = request.submit.req_id
                if req_id in own:
                    yield request
                if req_id not in own:
                    if own:
                        heapq.heappush(turns, (charged[tenant_id], last.get(tenant_id, 0), tenant_id))
                    break

    def remove(self, request: Request) -> None:
        """Take out `request`, which waits here. O(1)."""
        self.take(request)
        self.computed(request.submit.tenant_id)

    def take(self, request: Request) -> None:
        """Take out `request`, which waits here, because it goes to a worker: its tenant is active until `computed`."""
        tenant_id = request.submit.tenant_id
        own = self._waiting[tenant_id]
        del own[request.submit.req_id]
        self._num_waiting -= 1
        self._num_turns += 1
        self._last_turns[tenant_id] = self._num_turns
        if not own:
            del self._waiting[tenant_id]
        if request.held_for:
            self.hold(request, "")

    # ---- charges -------------------------------------------------------------------------------------------------

    def computing(self, tenant_id: str) -> None:
        """Note that a request of the tenant that did not wait here goes to a worker."""
        self._num_unfinished[tenant_id] = self._num_unfinished.get(tenant_id, 0) + 1

    def computed(self, tenant_id: str) -> None:
        """Note that a request's prompt is computed, or not wanted any more."""
        num = self._num_unfinished[tenant_id] - 1
        if num:
            self._num_unfinished[tenant_id] = num
        else:
            del self._num_unfinished[tenant_id]

    def charge(self, tenant_id: str, num_tokens: float) -> None:
        """Charge a tenant, or, less than 0, give back what it was charged too much."""
        self._charged[tenant_id] = self._charged.get(tenant_id, self._fair_charge) + num_tokens
        self._fair_charge += num_tokens / max(1, len(self._num_unfinished))

    @property
    def num_active(self) -> int:
        """How many tenants have requests that wait, or whose prompts are not computed yet."""
        return len(self._num_unfinished)

    def lead(self, tenant_id: str) -> float:
        """Return how many tokens more than fair the tenant was charged."""
        return max(0.0, self._charged.get(tenant_id, 0.0) - self._fair_charge)

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
        return self._num_held.get(worker_id, 0)

    def check_integrity(self) -> None:
        """Assert that queues and counts agree."""
        assert all(self._waiting.values()), "a tenant without waiting requests is kept"
        assert self._num_waiting == sum(map(len, self._waiting.values())), "the count is off"
        assert self._num_held == Counter(request.held_for for request in self if request.held_for), "holds leak"
        assert all(count > 0 for count in self._num_unfinished.values())
        assert all(self._num_unfinished[tenant_id] >= len(waiting) for tenant_id, waiting in self._waiting.items())
