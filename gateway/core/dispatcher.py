"""Which waiting request goes to which worker now. The queue says whose turn it is, the router which worker; here it is
decided whether that worker gets it yet. No I/O."""

from __future__ import annotations

import msgspec

from kvasir.gateway.core.attempts import Attempts
from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.endings import deadline_exceeded
from kvasir.gateway.core.fleet import Fleet
from kvasir.gateway.core.receipts import Receipt, Receipts
from kvasir.gateway.core.request import NORMAL, Request
from kvasir.gateway.core.requests import Model
from kvasir.gateway.core.tenant_queue import CLASS_S
from kvasir.gateway.core.worker import Worker
from kvasir.gateway.routing.router import choose

_OTHER_DRAWS = "went on after {} tokens; this engine draws the rest by its own, other than the first worker would have"


class Dispatcher:
    """See the module. A request is routed over all workers of its model and waits for the one it wants."""

    def __init__(self, config: CoreConfig, fleet: Fleet, attempts: Attempts, receipts: Receipts) -> None:
        self._config = config
        self._fleet = fleet
        self._attempts = attempts
        self._receipts = receipts

    def dispatch(self, model: Model, now: float) -> None:
        """Send what waits, tenant by tenant, to the workers that are best for it, as far as those have room."""
        if not model.queue and not model.suspects:
            return
        while model.suspects and (emptied := _emptied_for_suspect(model)) is not None and not emptied.in_flight:
            self._try_to_route(model.suspects.pop(0), model, [emptied], now)
        emptied = _emptied_for_suspect(model) if model.suspects else None
        workers = [w for w in model.workers if w.state == "ready" and not w.runs_suspect and w is not emptied]
        if not model.queue or not _have_credits(workers):
            return
        for request in model.queue.turns(now):
            if not request.held_for or not self._is_still_held(request, model, now):
                self._try_to_route(request, model, workers, now)
                if not model.queue or not _have_credits(workers):
                    return

    def _is_still_held(self, request: Request, model: Model, now: float) -> bool:
        """Return whether `request` waits for a worker that it has chosen lately and that has no room yet."""
        if now - request.held_at >= self._config.queue.reroute_s:
            return False
        worker = self._fleet.by_id.get(request.held_for)
        return worker is not None and worker.state == "ready" and not self._has_room(worker, request, model, now)

    def _has_room(self, worker: Worker, request: Request, model: Model, now: float) -> bool:
        """Return whether `worker`, which `request` has chosen, is to have it now."""
        config, tenant_id, key = self._config.queue, request.submit.tenant_id, request.held_key
        if not worker.is_fifo:
            return worker.has_room(tenant_id, key, config.window_s)
        queue, rank = model.queue, request.rank
        if rank and max(model.came_at[:rank]) > now - config.class_s:
            return worker.has_little(config.window_s / 2)
        if queue.num_active > 1 and queue.lead(tenant_id, now) > config.window_s * worker.rates.prefill_tokens_per_s:
            return worker.has_little(config.window_s)  # nobody could pass it there
        return worker.has_room(tenant_id, key, config.fifo_window_s)

    def _try_to_route(self, request: Request, model: Model, workers: list[Worker], now: float) -> None:
        """Route `request`, unless its deadline is over."""
        deadline = request.submit.deadline
        if deadline is not None and deadline <= now:
            error = deadline_exceeded(request, "while it waited for a worker")
            self._attempts.stop(request, "deadline", error)
            return
        try:
            self._route(request, model, workers, now)
        except Exception as bug:
            self._attempts.fail(request, bug)

    def _route(self, request: Request, model: Model, workers: list[Worker], now: float) -> None:
        """Choose one of `workers` for `request` and send it there, or let it wait for that one."""
        config, queue, needed = self._config.router, model.queue, request.num_needed
        num_others = len(queue) / len(workers)
        candidates = [
            worker.candidate(request, now, config, queue.num_held(worker.worker_id) + num_others)
            for worker in workers
            if needed <= worker.max_context
        ]
        if not candidates:
            return
        tenant_id = request.submit.tenant_id
        lead = 0.0 if request.is_suspect else queue.lead(tenant_id, now)
        ahead = lead + (request.rank - NORMAL) * CLASS_S * candidates[0].prefill_tokens_per_s
        decision = choose(request.num_tokens, candidates, now, config, ahead)
        worker = self._fleet.by_id[decision.worker_id]
        if request.is_suspect:
            queue.computing(tenant_id)
        else:
            request.held_at, request.held_key = now, decision.key
            if not self._has_room(worker, request, model, now):
                request.held_since = request.held_since or now
                queue.hold(request, decision.worker_id)
                return
            queue.take(request)
        if request.num_delivered and request.submit.sampling.temperature and "resumed_draws" in worker.hello.lacks:
            decision = msgspec.structs.replace(decision, note=_OTHER_DRAWS.format(request.num_delivered))
        try:
            self._attempts.begin(worker, request, decision, ahead, now)
        except Exception:
            queue.computed(tenant_id)  # it is nowhere now, and will fail
            raise
        if request.attempt == 1:
            model.counters.queue_s.add(now - request.queued_at)
        held_s = now - request.held_since if request.held_since else 0.0
        request.held_since = 0.0
        self._receipts.add(request.submit.req_id, Receipt(decision, now - request.queued_at, held_s, lead))


def _have_credits(workers: list[Worker]) -> bool:
    return bool([worker for worker in workers if worker.num_credits > 0])  # half the time of `any`


def _emptied_for_suspect(model: Model) -> Worker | None:
    """Return the worker that gets nothing new until it is empty, because the first suspect is to run alone there."""
    needed = model.suspects[0].num_needed
    able = [w for w in model.workers if w.state == "ready" and not w.runs_suspect and w.max_context >= needed]
    return min(able, key=lambda worker: (len(worker.in_flight), worker.worker_id), default=None)
