"""What waits for the workers of one model: a queue per tenant and class, and whose turn it is.

A tenant is charged for what is computed for it, by its weight (virtual token counters, Sheng et al., OSDI 2024), and
the charges are kept twice, because turns and workers ask for different things.

Turns go by *tags*, of prompts and answers: the least is next. A tenant that has nothing waiting is lifted to the least
tag of those that wait. What it did not ask for is not saved, and what others had meanwhile, since nobody else wanted
it, is not owed.

Workers order prompts by *leads*, of prompts alone. The *fair charge* is what a tenant would have been charged that
always got its part of what is computed among those active (the virtual time of weighted fair queueing); what a tenant
got more than that, wanted by others or not, is its lead. It lets the long prompts of those who ask for little go before
the many short ones of a flood. A lead fades down to what the tag is above the least that waits, or one that had a night
for itself would be the last all day.

Requests of a higher class come first, whatever was charged. `CLASS_S` of waiting make up for a class, so that nothing
waits for ever, but put nothing above the highest class that waits.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from kvasir.gateway.core.request import Request

LOOKS = 64
FEWEST_LOOKS = 4
"""So many requests may be sent next, in equal parts of all tenants' classes, and so many of each at least: when one
waits for its worker, those behind it may go elsewhere. Of a tenant with a lead always the fewest: its prompts would
take the caches of all workers."""
OUTPUT_WEIGHT = 2.0
"""What a token of an answer is charged, in uncached tokens of a prompt: as in VTC."""
CLASS_S = 10.0
FADE_S = 60.0
"""Time constant of leads. With half as much a flood of agents delays others 1.4 times as long in the lab."""

_Lane = tuple[str, int]
"""A tenant and a class (`Request.rank`)."""


@dataclass(slots=True)
class _Tenant:
    """`tag`, `charged`: what was computed for it, over its weight, as lifted; `charged` is to be compared with the fair
    charge, and faded until `faded_at`. `last_turn`: of those with the same tag, the one served longest ago is next.
    `num_unfinished`: requests that wait, or whose prompts are not computed yet."""

    charged: float
    tag: float = 0.0
    faded_at: float = 0.0
    weight: int = 1
    last_turn: int = 0
    num_waiting: int = 0
    num_unfinished: int = 0


class TenantQueue:
    """First come, first served within a tenant's class. Also knows which worker a request waits for, if it has chosen
    one. `weight(tenant_id)`: what is in force now; heeded with a tenant's next request."""

    def __init__(self, weight: Callable[[str], int] = lambda tenant_id: 1) -> None:
        self._weight = weight
        self._waiting: dict[_Lane, OrderedDict[bytes, Request]] = {}  # each is read and emptied at its front
        self._tenants: dict[str, _Tenant] = {}
        self._num_waiting = 0
        self._num_turns = 0
        self._highest_tag = 0.0
        self._least_tag = 0.0
        self._fair_charge = 0.0
        self._sum_of_weights = 0  # of active tenants
        self.num_active = 0
        """Tenants that have requests that wait, or whose prompts are not computed yet."""
        self._num_held: Counter[str] = Counter()  # by worker

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        """All waiting requests, tenant by tenant. The queue must not change meanwhile."""
        for requests in self._waiting.values():
            yield from requests.values()

    def __contains__(self, request: Request) -> bool:
        return request.submit.req_id in self._waiting.get((request.submit.tenant_id, request.rank), ())

    def push(self, request: Request) -> None:
        """Append `request` to its tenant's queue."""
        tenant_id = request.submit.tenant_id
        tenant = self._active(tenant_id)
        if not tenant.num_waiting:
            others = self._waiting
            least_tag = min([self._tenants[other].tag for other, _ in others]) if others else self._highest_tag
            if tenant.tag < least_tag:
                tenant.tag = least_tag
            if tenant.charged < self._fair_charge:
                tenant.charged = self._fair_charge
        lane = tenant_id, request.rank
        own = self._waiting.get(lane)
        if own is None:
            own = self._waiting[lane] = OrderedDict()
        own[request.submit.req_id] = request
        self._num_waiting += 1
        tenant.num_waiting += 1

    def push_front(self, request: Request) -> None:
        """Put `request` before everything of its tenant's class: it has had its turn, and its worker was lost."""
        self.push(request)
        self._waiting[request.submit.tenant_id, request.rank].move_to_end(request.submit.req_id, last=False)

    def turns(self, now: float) -> Iterator[Request]:
        """Yield the requests that may be sent next, in turn: the first few of each tenant's class.

        The one yielded last may be removed and its tenant charged: then the turns go on with whoever has the least tag.
        """
        if not self._waiting:
            return
        highest = min([rank for _, rank in self._waiting])
        turns = [self._turn(lane, own, now, highest) for lane, own in self._waiting.items()]
        self._least_tag = min([turn[1] for turn in turns])
        heapq.heapify(turns)
        looks = max(FEWEST_LOOKS, LOOKS // len(turns))
        while turns:
            lane = heapq.heappop(turns)[-1]
            own = self._waiting.get(lane, OrderedDict())
            num_looks = looks if self.lead(lane[0], now) < 1 else FEWEST_LOOKS
            for request in list(islice(own.values(), num_looks)):
                req_id = request.submit.req_id
                if req_id in own:
                    yield request
                if req_id not in own:
                    if own:
                        heapq.heappush(turns, self._turn(lane, own, now, highest))
                    break

    def _turn(
        self, lane: _Lane, own: dict[bytes, Request], now: float, highest: int
    ) -> tuple[int, float, int, float, _Lane]:
        """Return what a lane that waits is ordered by. Of one tenant's lanes the one that has waited longest is next,
        where the first of both count as the same class."""
        tenant, since = self._tenants[lane[0]], next(iter(own.values())).queued_at
        rank = max(highest, lane[1] - int((now - since) / CLASS_S))
        return rank, tenant.tag, tenant.last_turn, since, lane

    def remove(self, request: Request) -> None:
        """Take out `request`, which waits here. O(1)."""
        self.take(request)
        self.computed(request.submit.tenant_id)

    def take(self, request: Request) -> None:
        """Take out `request`, which waits here, because it goes to a worker: its tenant is active until `computed`."""
        lane = request.submit.tenant_id, request.rank
        own, tenant = self._waiting[lane], self._tenants[lane[0]]
        del own[request.submit.req_id]
        self._num_waiting -= 1
        self._num_turns += 1
        tenant.num_waiting -= 1
        tenant.last_turn = self._num_turns
        if not own:
            del self._waiting[lane]
        if request.held_for:
            self.hold(request, "")

    @property
    def num_taken(self) -> int:
        """How many requests have left the queue so far."""
        return self._num_turns

    def share(self, tenant_id: str) -> float:
        """Return a tenant's part of what is computed as things stand, from 0 to 1."""
        tenant = self._tenants.get(tenant_id)
        return tenant.weight / self._sum_of_weights if tenant is not None and tenant.num_unfinished else 1.0

    # ---- charges -------------------------------------------------------------------------------------------------

    def computing(self, tenant_id: str) -> None:
        """Note that a request of the tenant that did not wait here goes to a worker."""
        self._active(tenant_id)

    def computed(self, tenant_id: str) -> None:
        """Note that a request's prompt is computed, or not wanted any more."""
        tenant = self._tenants[tenant_id]
        tenant.num_unfinished -= 1
        if not tenant.num_unfinished:
            self.num_active -= 1
            self._sum_of_weights -= tenant.weight

    def charge(self, tenant_id: str, num_tokens: float) -> None:
        """Charge a tenant for uncached tokens of prompts, or, less than 0, give back what it was charged too much."""
        tenant = self._tenants[tenant_id]
        tenant.charged += num_tokens / tenant.weight
        self._fair_charge += num_tokens / (self._sum_of_weights or tenant.weight)
        self._advance(tenant, num_tokens)

    def charge_output(self, tenant_id: str, num_tokens: int) -> None:
        """Charge a tenant for tokens of answers."""
        self._advance(self._tenants[tenant_id], OUTPUT_WEIGHT * num_tokens)

    def _advance(self, tenant: _Tenant, num_tokens: float) -> None:
        tenant.tag += num_tokens / tenant.weight
        if tenant.tag > self._highest_tag:
            self._highest_tag = tenant.tag

    def forget(self, tenant_id: str) -> None:
        """Drop what is known of a tenant that has nothing here, and nothing in a worker either."""
        tenant = self._tenants.pop(tenant_id, None)
        assert tenant is None or not tenant.num_unfinished

    def lead(self, tenant_id: str, now: float) -> float:
        """Return how many tokens more than fair the tenant was charged lately, as a tenant of mean weight counts them.
        Below 0: it has waited and got less."""
        tenant = self._tenants[tenant_id]
        lead = tenant.charged - self._fair_charge
        if lead > 0 and tenant.faded_at != now:
            left = max(0.0, tenant.tag - self._least_tag) if tenant.num_waiting else 0.0
            if lead > left:
                lead = left + (lead - left) * math.exp((tenant.faded_at - now) / FADE_S)
                tenant.charged = self._fair_charge + lead
        tenant.faded_at = now
        return lead * self._sum_of_weights / self.num_active if self.num_active else lead

    def _active(self, tenant_id: str) -> _Tenant:
        """Return a tenant, made if it is new, with one more request that is not computed, and by its weight of now."""
        tenant, weight = self._tenants.get(tenant_id), self._weight(tenant_id)
        if tenant is None:
            tenant = self._tenants[tenant_id] = _Tenant(self._fair_charge)
        if tenant.num_unfinished:
            self._sum_of_weights += weight - tenant.weight
        else:
            self.num_active += 1
            self._sum_of_weights += weight
        tenant.weight = weight
        tenant.num_unfinished += 1
        return tenant

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
        waiting = Counter(request.submit.tenant_id for request in self)
        for tenant_id, tenant in self._tenants.items():
            assert tenant.num_waiting == waiting[tenant_id] <= tenant.num_unfinished
        active = [tenant for tenant in self._tenants.values() if tenant.num_unfinished]
        assert self.num_active == len(active) and self._sum_of_weights == sum(tenant.weight for tenant in active)
