"""All unfinished requests: by id, in their queues, and counted per tenant and model.

The only place where a request changes its state; the core decides when. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from kvasir.gateway.core.admission import Share
from kvasir.gateway.core.api import Finished, Submit
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.counters import ModelCounters
from kvasir.gateway.core.promises import MARGIN, LeavingRate, Promises, Tickets
from kvasir.gateway.core.request import Request
from kvasir.gateway.core.tenant_queue import TenantQueue
from kvasir.gateway.core.worker import Worker
from kvasir.protocol.admin_records import UsageInfo
from kvasir.protocol.errors import KvasirError, Overloaded, UnknownModel
from kvasir.protocol.terms import RANKS

EXTRA = 1.5  # times what may wait, with those that come back
UNKNOWN_S = 5.0  # between those that are refused, when nothing is known of how fast the queue gets shorter


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """How many requests may wait: in all, and of one tenant. Those of lost workers come on top, and of those that were
    refused and come back when they were told to up to half as many (`EXTRA`): newcomers do not take their places.

    A worker gets no request that would wait there for `window_s` of prefill of the same tenant. One without an order of
    its own gets none that would for `fifo_window_s`, since short prompts do not pass long ones there; but of a tenant
    with a lead of `window_s` it gets one only when all it has takes less than that, as long as others have work, too.
    While requests of a higher class come, at least one in `class_s`, it gets one of a lower class only when all it has
    takes less than half of `window_s`, so that none of a higher class waits there for longer.
    A request that waits for a worker chooses again after `reroute_s`.
    """

    max_queued: int = 10_000
    max_queued_per_tenant: int = 1_000
    window_s: float = 0.8
    fifo_window_s: float = 6.4
    class_s: float = 10.0
    reroute_s: float = 0.4


@dataclass(slots=True, eq=False)
class Model:
    """One model: its queue and its workers.

    Suspects wait apart, since they need a worker of their own. `lost_at`: when it last lost a worker, or was made.
    `max_context`: the largest that it ever had. `came_at`: when the last request of each class came.
    """

    name: str
    lost_at: float
    queue: TenantQueue
    suspects: list[Request] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    counters: ModelCounters = field(default_factory=ModelCounters)
    leaving: LeavingRate = field(default_factory=LeavingRate)
    max_context: int = 1
    came_at: list[float] = field(default_factory=lambda: [-inf] * len(RANKS))

    @property
    def num_waiting(self) -> int:
        return len(self.suspects) + len(self.queue)

    @property
    def leaving_per_s(self) -> float:
        """How many requests a second leave the queue while some wait: measured, or else by how long others stayed."""
        return self.leaving.per_s or sum(worker.turnover_per_s for worker in self.workers)

    def discard(self, request: Request) -> None:
        """Take out `request` if it waits here."""
        if request in self.suspects:
            self.suspects.remove(request)
        elif request in self.queue:
            self.queue.remove(request)


class Requests:
    """Requests from `enter` to `finish`; a finished one stays until `release` while a worker still holds it."""

    def __init__(self, config: QueueConfig, models: Iterable[str], now: float, billing: Billing) -> None:
        self._billing = billing
        self.models: dict[str, Model] = {}
        for name in sorted(models):
            self.model(name, now)
        self.tenants: dict[str, UsageInfo] = {}
        self._gone: set[str] = set()  # of them
        self.num_queued = 0
        self.num_running = 0
        self._config = config
        self._requests: dict[bytes, Request] = {}
        self._next_deadline = inf
        self._promises: dict[str, Promises] = {}  # by tenant
        self._tickets = Tickets()

    def model(self, name: str, now: float) -> Model:
        """Return the model of that name, made if it is new."""
        model = self.models.get(name)
        if model is None:
            model = self.models[name] = Model(name, now, TenantQueue(self._billing.weight))
        return model

    def queue_of(self, request: Request) -> TenantQueue:
        """Return the queue where `request` waits or has waited, which knows what its tenant is charged."""
        return self.models[request.submit.model].queue

    def get(self, req_id: bytes) -> Request | None:
        """Return the request that has not got its `Finished`, None if there is none."""
        request = self._requests.get(req_id)
        return None if request is None or request.state == "closed" else request

    def enter(self, submit: Submit, share: Share | KvasirError, now: float) -> Request | KvasirError:
        """Queue a new request, or return why it is refused: as billing has it, or here."""
        tenant = self.tenants.get(submit.tenant_id)
        if tenant is None:
            tenant = self.tenants[submit.tenant_id] = UsageInfo()
        tenant.num_requests += 1
        error = share if isinstance(share, KvasirError) else self._refusal(submit, tenant, now)
        if error is not None:
            tenant.num_refused += 1
            if isinstance(share, Share):
                self._billing.finished(share, Finished(submit.req_id, "refused", 0, 0))
            return error
        assert isinstance(share, Share)
        rank = share.bill.rank(submit.priority)
        request = Request(submit, submit.token_ids, submit.prefix_hashes, now, share, rank=rank)
        self._requests[submit.req_id] = request
        if submit.deadline is not None and submit.deadline < self._next_deadline:
            self._next_deadline = submit.deadline
        model = self.models[submit.model]
        model.queue.push(request)
        model.came_at[request.rank] = now
        tenant.num_waiting += 1
        self.num_queued += 1
        return request

    def dispatched(self, request: Request) -> None:
        """Count `request`, popped from its queue and sent, as running."""
        tenant = self.tenants[request.submit.tenant_id]
        tenant.num_waiting -= 1
        tenant.num_running += 1
        self.num_queued -= 1
        self.num_running += 1
        request.state = "dispatched"

    def requeue(self, request: Request, now: float) -> None:
        """Put a running request, which no worker has any more, before everything of its tenant or with the suspects."""
        model, tenant = self.models[request.submit.model], self.tenants[request.submit.tenant_id]
        self._stopped_running(request)
        tenant.num_waiting += 1
        self.num_queued += 1
        request.state = "queued"
        request.queued_at = now
        if request.is_suspect:
            model.suspects.insert(0, request)
        else:
            model.queue.push_front(request)

    def finish(self, request: Request, reason: str, error: KvasirError | None = None) -> None:
        """Close `request`, out of its queue, and put its one `Finished`."""
        submit = request.submit
        tenant = self.tenants[submit.tenant_id]
        if request.state == "queued":
            tenant.num_waiting -= 1
            self.num_queued -= 1
        else:
            self._stopped_running(request)
        request.state = "closed"
        if not request.is_held:
            del self._requests[submit.req_id]
        finished = request.finished(reason, None if error is None else error.info())
        tenant.prompt_tokens += finished.num_prompt_tokens
        tenant.cached_tokens += finished.num_cached_tokens
        tenant.output_tokens += finished.num_output_tokens
        tenant.num_finished[reason] = tenant.num_finished.get(reason, 0) + 1
        self._billing.finished(request.share, finished)
        submit.sink.put(finished)

    def release(self, request: Request) -> None:
        """Forget a closed request, which no worker holds any more."""
        del self._requests[request.submit.req_id]

    def of_payer(self, payer_id: str) -> list[Request]:
        """Return the unfinished requests of a tenant or key."""
        return [
            request
            for request in self._requests.values()
            if request.state != "closed" and payer_id in (request.submit.tenant_id, request.submit.key_id)
        ]

    def take_late(self, now: float) -> list[Request]:
        """Return all requests past their deadline, still in their states. A scan when the first one is due: cheaper
        than a heap for all."""
        late: list[Request] = []
        if now < self._next_deadline:
            return late
        self._next_deadline = inf
        for request in self._requests.values():
            deadline = request.submit.deadline
            if deadline is None or request.state == "closed":
                continue
            if deadline <= now:
                late.append(request)
            elif deadline < self._next_deadline:
                self._next_deadline = deadline
        return late

    def forget(self, payer_id: str) -> None:
        """Drop the counts of a tenant that is gone, as soon as no worker holds anything of it; keys have none."""
        if payer_id in self.tenants:
            self._gone.add(payer_id)

    def sweep(self) -> None:
        """Drop what there is to be forgotten. Call it some ten times/s."""
        if not self._gone:
            return
        for tenant_id in self._gone - {request.submit.tenant_id for request in self._requests.values()}:
            self._gone.remove(tenant_id)
            del self.tenants[tenant_id]
            for model in self.models.values():
                model.queue.forget(tenant_id)

    def measure_rates(self, now: float) -> None:
        """Measure how fast queues get shorter, for `Overloaded.retry_after_s`."""
        for model in self.models.values():
            model.leaving.measure(now, model.queue.num_taken, is_waiting=len(model.queue) > 0)

    def check_integrity(self) -> None:
        """Assert that states, queues and counts agree."""
        states = {"queued": 0, "dispatched": 0, "closed": 0}
        for request in self._requests.values():
            states[request.state] += 1
            assert request.is_held == (request.state != "queued"), "a request is in two places, or in none"
            if request.state == "queued":
                model = self.models[request.submit.model]
                assert (request in model.suspects, request in model.queue) == (
                    request.is_suspect,
                    not request.is_suspect,
                )
        tenants, models = self.tenants.values(), self.models.values()
        assert states["queued"] == self.num_queued == sum(model.num_waiting for model in models)
        assert states["dispatched"] == self.num_running
        assert self.num_queued == sum(tenant.num_waiting for tenant in tenants)
        assert self.num_running == sum(tenant.num_running for tenant in tenants)
        num_held = sum(len(worker.in_flight) for model in models for worker in model.workers)
        assert states["dispatched"] + states["closed"] == num_held, "a worker holds a request that nobody knows"
        for model in models:
            model.queue.check_integrity()

    def _stopped_running(self, request: Request) -> None:
        self.tenants[request.submit.tenant_id].num_running -= 1
        self.num_running -= 1

    def _refusal(self, submit: Submit, tenant: UsageInfo, now: float) -> KvasirError | None:
        if submit.model not in self.models:
            names = ", ".join(sorted(self.models)) or "none"
            return UnknownModel(f"model {submit.model!r} is not served here; served: {names}", param="model")
        num_in_all, num_of_tenant = self._config.max_queued, self._config.max_queued_per_tenant
        is_full = self.num_queued >= num_in_all
        if not is_full and tenant.num_waiting < num_of_tenant:
            return None
        has_ticket = self._tickets.take(submit, now) is not None
        if has_ticket and self.num_queued < EXTRA * num_in_all and tenant.num_waiting < EXTRA * num_of_tenant:
            return None
        if is_full:
            return self._overloaded("the queue is full", self.num_queued, submit, now)
        return self._overloaded("this tenant has too many requests waiting", tenant.num_waiting, submit, now)

    def _overloaded(self, what: str, num_waiting: int, submit: Submit, now: float) -> Overloaded:
        """Return a refusal that says when its tenant's next place in the queue is free that nobody was told of."""
        model, tenant_id = self.models[submit.model], submit.tenant_id
        per_s = model.leaving_per_s * model.queue.share(tenant_id)
        each_s = MARGIN / per_s if per_s else UNKNOWN_S
        retry_after_s = self._promises.setdefault(tenant_id, Promises()).wait_s(now, each_s, each_s)
        self._tickets.give(submit, now + retry_after_s)
        return Overloaded(f"{what} ({num_waiting}); try again in {retry_after_s:.1f} s", retry_after_s=retry_after_s)
