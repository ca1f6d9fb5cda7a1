"""What workers have in hand: an attempt of a request, from `begin` until its worker is done with it or is lost.

The only place where a worker's books, the charge of a tenant and the answer of a client change by an attempt, so that
they agree. No I/O.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

from kvasir.gateway.core.api import Delta
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.counters import Totals
from kvasir.gateway.core.endings import end_of_answer, end_without_worker, last_word, misfit
from kvasir.gateway.core.fleet import Fleet
from kvasir.gateway.core.notices import Broken, Notice
from kvasir.gateway.core.receipts import Receipts
from kvasir.gateway.core.request import Request
from kvasir.gateway.core.requests import Requests
from kvasir.gateway.core.savings import Savings
from kvasir.gateway.core.worker import Attempt, Worker
from kvasir.gateway.routing.router import Decision
from kvasir.protocol.errors import KvasirError
from kvasir.protocol.messages import Abort, Command, Output, Resync
from kvasir.protocol.tokens import TOKEN_BYTES, num_tokens

CHARGED_AT_ONCE = 64
"""So many tokens of an answer are charged to its tenant together, or what there is at its end."""


class Attempts:
    """See the module. `totals`, `receipts` and `savings` are written here; `send` and `notify` are the core's."""

    def __init__(
        self,
        config: CoreConfig,
        send: Callable[[bytes, Command], None],
        notify: Callable[[Notice], None],
        *,
        fleet: Fleet,
        requests: Requests,
        billing: Billing,
        totals: Totals,
        receipts: Receipts,
        savings: Savings,
    ) -> None:
        self._config = config
        self._send = send
        self._notify = notify
        self._fleet = fleet
        self._requests = requests
        self._billing = billing
        self._totals = totals
        self._receipts = receipts
        self._savings = savings
        self._unwritten: dict[bytes, list[tuple[Worker, Output]]] = {}  # by bill, until its row is on disk

    # ---- begin and end -------------------------------------------------------------------------------------------

    def begin(self, worker: Worker, request: Request, decision: Decision, ahead: float, now: float) -> None:
        """Send `request`, which is out of its queue, to the worker that was chosen, and charge its tenant. `ahead`: its
        place there."""
        request.attempt += 1
        self._send(worker.peer, request.generate(now, ahead))
        self._requests.dispatched(request)
        worker.take(request, decision, now, self._config.router.heat_decay_s)
        num_uncached = worker.in_flight[request.submit.req_id].num_uncached_tokens
        self._requests.queue_of(request).charge(request.submit.tenant_id, num_uncached)
        self._totals.num_dispatches += 1

    def stop(self, request: Request, reason: str, error: KvasirError | None = None) -> None:
        """Finish a request before its time. Its worker, if it has one, is told; the credit is free when it answers."""
        if request.state == "closed":
            return
        req_id = request.submit.req_id
        if request.is_held:
            worker = self._fleet.by_id[request.worker_id]
            self._prefilled(worker, worker.in_flight[req_id])  # nobody waits for it any more
            self._send(worker.peer, Abort(req_id, request.attempt))
        else:
            self._requests.models[request.submit.model].discard(request)
        self._requests.finish(request, reason, error)

    def fail(self, request: Request, bug: Exception) -> None:
        """Fail the one request whose handling has raised."""
        self._notify(Broken(request.submit.req_id, "".join(traceback.format_exception(bug))))
        self.stop(request, "error", KvasirError("the gateway failed on this request; its log says how"))

    def take_back(self, worker: Worker, now: float, *, is_death: bool) -> int:
        """Queue everything again that a lost worker had, in the order in which it was sent, unless that is its end.
        Return how much was unfinished."""
        died_with = worker.computing() if is_death else []
        unfinished = []
        for req_id in reversed(list(worker.in_flight)):
            request = self._give_back(worker, req_id, now)
            if request.state == "closed":
                self._requests.release(request)
            else:
                unfinished.append(request)
        for request in unfinished:
            try:
                self._go_on(request, worker, now, is_death=request in died_with)
            except Exception as bug:
                self.fail(request, bug)
        return len(unfinished)

    # ---- outputs -------------------------------------------------------------------------------------------------

    def outputs(self, worker: Worker, outputs: Sequence[Output], now: float) -> str | None:
        """Take in what a worker has computed, until something is wrong with it; return that: it is to be lost then.

        What belongs to a bill whose row is not on disk yet is kept until it is `written`.
        """
        for output in outputs:
            attempt = worker.in_flight.get(output.req_id)
            if attempt is None or attempt.request.attempt != output.attempt:
                self._count_stale(worker)
                continue
            bill = attempt.request.share.bill
            if not bill.is_written:
                self._unwritten.setdefault(bill.bill_id, []).append((worker, output))
                continue
            try:
                violation = self._output(worker, attempt, output, now)
            except Exception as bug:
                self.fail(attempt.request, bug)
                continue
            if violation is not None:
                return violation
        return None

    def written(self, bill_id: bytes) -> list[tuple[Worker, Output]]:
        """Return the outputs that waited for the row of this bill, for good."""
        return self._unwritten.pop(bill_id, [])

    def _output(self, worker: Worker, attempt: Attempt, output: Output, now: float) -> str | None:
        """Deliver one output; return what is wrong with it, if anything."""
        request = attempt.request
        attempt.num_generated += num_tokens(output.token_ids) + output.num_extra_tokens
        if attempt.num_generated >= CHARGED_AT_ONCE:
            self._charge_output(attempt)
        if request.state == "dispatched":
            violation = misfit(request, output)
            if violation is not None:
                return violation
            self._deliver(worker, attempt, output, now)
        elif output.num_cached_tokens is not None:  # cancelled, and only now told
            self._matched(worker, attempt, min(output.num_cached_tokens, request.num_tokens), now)
        if output.finish_reason is None:
            return None
        self._give_back(worker, output.req_id, now)
        if request.state == "closed":  # cancelled: its end has been told, perhaps in answer to the last delta
            self._requests.release(request)
        elif output.finish_reason == "abort":  # not asked for: the worker is about to leave, and wants no more
            worker.state = "draining"
            self._go_on(request, worker, now)
        else:
            end = last_word(request, output, worker.worker_id)
            self._requests.finish(request, end.reason, end.error)
        return None

    def _deliver(self, worker: Worker, attempt: Attempt, output: Output, now: float) -> None:
        """Put the tokens of an output that fits; what has been delivered already is not delivered again."""
        request = attempt.request
        if output.seq < request.num_delivered:
            self._count_stale(worker)
            return
        if output.guessed_cached_tokens is not None:
            request.guess_cached(output.guessed_cached_tokens)
        if output.num_cached_tokens is not None:
            request.is_begun = True
            self._matched(worker, attempt, output.num_cached_tokens, now)
            self._savings.add(request.submit, output.num_cached_tokens)
        if not output.token_ids:
            return
        request.is_begun = True
        self._prefilled(worker, attempt)
        if request.first_token_at is None:
            request.first_token_at = now
            request.share.num_cached = request.num_cached_tokens or 0
            self._requests.models[request.submit.model].counters.ttft_s.add(now - request.submit.arrived)
        share, num_before, num_new = request.share, request.num_delivered, num_tokens(output.token_ids)
        worker.counters.output_tokens += num_new
        if num_before + num_new <= share.num_granted or self._billing.cover(share, num_before + num_new, now):
            request.delivered += output.token_ids
            request.submit.sink.put(Delta(output.req_id, output.token_ids, output.logprobs))
            return
        num_covered = share.num_granted - num_before
        if num_covered:  # the limits and budgets end here, in the midst of an output
            covered = output.token_ids[: num_covered * TOKEN_BYTES]
            request.delivered += covered
            request.submit.sink.put(Delta(output.req_id, covered, output.logprobs[:num_covered]))
        self.stop(request, "length")

    def _matched(self, worker: Worker, attempt: Attempt, num_cached_tokens: int, now: float) -> None:
        """Take in how many tokens of a prompt were cached, charge what it was charged too little, and say why no more
        were."""
        worker.matched(attempt, num_cached_tokens)
        request = attempt.request
        num_missing = attempt.num_predicted_tokens - num_cached_tokens
        self._requests.queue_of(request).charge(request.submit.tenant_id, num_missing)
        self._receipts.matched(request, worker.worker_id, num_cached_tokens, self._fleet.index_of, now)
        if worker.audit.is_due(now):
            worker.resync(now)
            self._totals.num_resyncs += 1
            self._send(worker.peer, Resync())

    def _prefilled(self, worker: Worker, attempt: Attempt) -> bool:
        """Note that a prompt is computed or not wanted any more; False: that was known."""
        is_news = worker.prefilled(attempt)
        if is_news:
            self._requests.queue_of(attempt.request).computed(attempt.request.submit.tenant_id)
        return is_news

    def _give_back(self, worker: Worker, req_id: bytes, now: float) -> Request:
        """Take an attempt that is over from its worker. A prompt that was not computed is not charged, but for one that
        is not wanted any more."""
        attempt = worker.in_flight[req_id]
        request = attempt.request
        self._charge_output(attempt)
        if self._prefilled(worker, attempt):
            self._requests.queue_of(request).charge(request.submit.tenant_id, -attempt.num_uncached_tokens)
        return worker.give_back(req_id, now)

    def _charge_output(self, attempt: Attempt) -> None:
        """Charge what was generated since the last time, rejected drafts too."""
        if attempt.num_generated:
            request = attempt.request
            self._requests.queue_of(request).charge_output(request.submit.tenant_id, attempt.num_generated)
            attempt.num_generated = 0

    def _go_on(self, request: Request, worker: Worker, now: float, *, is_death: bool = False) -> None:
        """Queue `request`, whose attempt on `worker` is over without an end, first of its tenant; or finish it for
        good."""
        config = self._config
        end = end_without_worker(request, now, config.max_redispatches, config.max_deaths, is_death=is_death)
        if end is None:
            end = end_of_answer(request, worker.hello)  # all workers of a model have one engine
        if end is None:
            request.go_on_elsewhere(config.block_size)
            self._requests.requeue(request, now)
            self._totals.num_redispatches += 1
        else:
            self._totals.num_poisoned += end.is_poison
            self._requests.finish(request, end.reason, end.error)

    def _count_stale(self, worker: Worker) -> None:
        worker.counters.num_stale_outputs += 1
        self._totals.num_stale_outputs += 1
