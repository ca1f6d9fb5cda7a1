"""The core: a state machine from requests and reports to commands and events. No I/O, no tasks, no waiting.

It is called from the tasks of one Trio thread and never awaits, so that every call sees and leaves a consistent
state. Commands leave through `send`, events through each request's sink, news about workers and bugs through `notify`.

    submit -> queued -> dispatched -> closed          one queue per model, by tenant
                 ^---------'  worker lost: attempt + 1, from prompt + delivered tokens

Compute is at-least-once; an event reaches a sink exactly once and in order, and every request ends in one `Finished`.
An exception out of the handling of one request is a bug that fails this request, not the process.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from kvasir.gateway.core.admission import Bill
from kvasir.gateway.core.api import Cancel, Change, CoreApi, Delta, Finished, ModelInfo, Standing, Submit
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.counters import Totals
from kvasir.gateway.core.endings import deadline_exceeded, end_of_answer, end_without_worker, last_word, misfit
from kvasir.gateway.core.fleet import Fleet
from kvasir.gateway.core.kv_orders import KvOrders
from kvasir.gateway.core.misses import Prompts, change, explain, is_worth_a_reason
from kvasir.gateway.core.notices import Broken, Cause, Joined, Lost, Notice, Rejected
from kvasir.gateway.core.receipts import Receipt, Receipts
from kvasir.gateway.core.request import NORMAL, Request
from kvasir.gateway.core.requests import Model, QueueConfig, Requests
from kvasir.gateway.core.savings import Savings
from kvasir.gateway.core.statistics import CoreStatistics, core_statistics
from kvasir.gateway.core.tenant_queue import CLASS_S
from kvasir.gateway.core.worker import Attempt, Worker
from kvasir.gateway.core.worker_checks import LivenessConfig, failure, refusal
from kvasir.gateway.routing.prefix_index import PrefixIndex
from kvasir.gateway.routing.router import RouterConfig, choose
from kvasir.protocol.errors import KvasirError, Unavailable
from kvasir.protocol.messages import (
    Abort,
    Bye,
    Command,
    Hello,
    Identify,
    KvAccounts,
    Output,
    Refused,
    Resync,
    Snapshot,
    StepReport,
    Welcome,
)
from kvasir.protocol.tokens import TOKEN_BYTES, num_tokens

_DRAINING = Unavailable("the gateway is shutting down; send the request to another one, or again in a minute")
_PROBE = Abort(b"\0", 0)  # nobody's request: workers ignore it, but a dead link cannot take it
_OTHER_DRAWS = "went on after {} tokens; this engine draws the rest by its own, other than the first worker would have"


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Times in seconds. `models` empty: whatever workers bring is served. A request is dispatched at most
    1 + `max_redispatches` times; after `max_deaths` deaths of workers it is suspected of poison, see `endings`.
    `root(fingerprint, dtype)`: of a model's chains."""

    public_namespace: bytes
    block_size: int = 16
    models: frozenset[str] = frozenset()
    queue: QueueConfig = field(default_factory=QueueConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    liveness: LivenessConfig = field(default_factory=LivenessConfig)
    no_worker_timeout_s: float = 30.0
    max_redispatches: int = 3
    max_deaths: int = 2
    max_explained: int = 1_024
    root: Callable[[str, str], bytes] = lambda fingerprint, dtype: bytes(16)


def _ignore(notice: Notice) -> None:
    pass


class Core(CoreApi):
    """See the module. `send(peer, command)` never fails and calls nothing here; whoever carries commands says later, by
    `worker_unreachable`, which peers could not take them.

    `clock` returns monotonic seconds, the same that `Submit.arrived` and `.deadline` are in. `epoch`: random bytes per
    boot of the gateway, at most 24. `billing` None: nobody has limits or budgets. `kv`: what workers are told of
    floors, caps and pins. `receipts`: why requests went where they went. `savings`: which beginnings of prompts have
    saved how much.
    """

    def __init__(
        self,
        config: CoreConfig,
        send: Callable[[bytes, Command], None],
        clock: Callable[[], float],
        *,
        epoch: bytes,
        notify: Callable[[Notice], None] = _ignore,
        billing: Billing | None = None,
    ) -> None:
        self._config = config
        self._send = send
        self._clock = clock
        self.notify = notify
        self._fleet = Fleet(epoch, config.models)
        self._billing = billing or Billing()
        self._requests = Requests(config.queue, config.models, clock(), self._billing)
        self._totals = Totals()
        self.kv = KvOrders(self._fleet, send)
        self.receipts = Receipts(config.max_explained)
        self._prompts = Prompts()
        self.savings = Savings(config.block_size)
        self._held: dict[bytes, list[tuple[Worker, Output]]] = {}  # by bill, until its row is written
        self._draining = False
        self._ticked_at = clock()

    # ---- edges ---------------------------------------------------------------------------------------------------

    def submit(self, *submits: Submit) -> None:
        """Queue the requests of one API request and dispatch them to workers that have credits.

        A refusal is a `Finished` with an error.
        """
        now = self._clock()
        admitted = _DRAINING if self._draining else self._billing.admit(submits, now)
        for index, submit in enumerate(submits):
            share = admitted if isinstance(admitted, KvasirError) else admitted[index]
            entered = self._requests.enter(submit, share, now)
            if isinstance(entered, KvasirError):
                submit.sink.put(Finished(submit.req_id, "error", 0, 0, error=entered.info()))
        if isinstance(admitted, KvasirError):
            return
        self._billing.enter(admitted)
        for name in {submit.model for submit in submits}:
            if name in self._requests.models:
                self._dispatch(self._requests.models[name], now)

    def cancel(self, cancel: Cancel) -> None:
        """Finish a request with `cancel.reason`; its worker is told. Unknown and finished ids are ignored."""
        request = self._requests.get(cancel.req_id)
        if request is not None:
            request.num_told = cancel.num_output_tokens
            self._stop(request, cancel.reason)

    def sent(self, req_id: bytes, num_output_tokens: int) -> None:
        """Note how many tokens of an answer its client has been sent for sure. Unknown ids are ignored."""
        self._billing.sent(req_id, num_output_tokens)

    def closed(self, req_id: bytes) -> None:
        """Note that the client of a request has been sent its end, or wants none. Unknown ids are ignored."""
        self._billing.closed(req_id)

    def models(self) -> dict[str, ModelInfo]:
        """Return what is served or configured, by name. A model that never had a worker has no fingerprint yet."""
        return self._fleet.infos

    def standing(self, tenant_id: str, key_id: str) -> Standing | None:
        """Return what is left of a caller's limits; None: it has none."""
        return self._billing.standing(tenant_id, key_id, self._clock())

    def change(self, submit: Submit, previous_id: bytes) -> tuple[Change, int] | None:
        """As `CoreApi.change`."""
        return change(submit, self._prompts.of(submit.tenant_id, previous_id), self._config.block_size)

    # ---- workers -------------------------------------------------------------------------------------------------

    def worker_hello(self, peer: bytes, hello: Hello) -> None:
        """Let a worker in or refuse it.

        The same incarnation on another link has lost its old one: a new session begins, whose new epoch makes the
        worker drop its sequences. Another incarnation may take over a worker id only from a dead one: its first
        `Hello` is not answered but has the other's link probed, and it is refused when it says `Hello` again.
        """
        now = self._clock()
        known = self._fleet.by_peer.get(peer)
        if known is not None and known.hello == hello:
            self._welcome(known)
            return
        holder = self._fleet.by_id.get(hello.worker_id)
        reason = refusal(hello, self._config.block_size, self._config.models, self._fleet.served)
        if reason is None and holder is not None and self._is_alive(holder, peer, hello, now):
            if holder.challenger != peer:
                holder.challenger = peer
                self._send(holder.peer, _PROBE)
                return
            reason = (
                f"worker id {holder.worker_id!r} is in use by process {holder.hello.pid}, which is alive; "
                "give this worker another --worker-id or stop that process"
            )
        if reason is not None:
            self._totals.num_refused_workers += 1
            self._send(peer, Refused(reason))
            self.notify(Rejected(hello, reason))
            return
        for old in (known, holder):
            if old is not None and old.is_member:
                self._lose(old, "replaced", "was replaced by a new session", now)
        worker = self._fleet.admit(peer, hello, now)
        model = self._requests.model(hello.model, now)
        model.workers.append(worker)
        model.max_context = max(model.max_context, worker.max_context)
        self.notify(Joined(hello))
        self._welcome(worker)
        self._dispatch(model, now)

    def worker_report(self, peer: bytes, report: StepReport | Snapshot | KvAccounts | Bye) -> None:
        """Take in a report. A peer that is no worker of ours is asked to say `Hello`, and its report dropped."""
        now = self._clock()
        worker = self._fleet.by_peer.get(peer)
        if worker is None:
            if self._fleet.is_to_identify(peer, now, self._config.liveness.heartbeat_s):
                self._send(peer, Identify())
            return
        worker.last_report_at = now
        if isinstance(report, StepReport):
            self._step(worker, report, now)
        elif isinstance(report, Snapshot):
            worker.index.replace(report.event_seq, report.hashes)
        elif isinstance(report, KvAccounts):
            worker.kv = report
        else:
            self._lose(worker, "exited" if report.is_death else "bye", report.reason or "said goodbye", now)
        self._dispatch(self._requests.models[worker.hello.model], now)

    def worker_violation(self, peer: bytes, reason: str) -> None:
        """Note that `peer` sent something that is no report of ours: if it is a worker, it is lost."""
        worker = self._fleet.by_peer.get(peer)
        if worker is not None:
            self._lose_and_dispatch(worker, "protocol", reason)

    def worker_unreachable(self, peer: bytes) -> None:
        """Note that a command for `peer` could not be sent: if it is a worker, it is lost."""
        worker = self._fleet.by_peer.get(peer)
        if worker is not None:
            self._lose_and_dispatch(worker, "link", "cannot be reached")

    def worker_lost(self, worker_id: str, reason: str, *, pid: int | None = None, cause: Cause = "exited") -> None:
        """Hand back everything `worker_id` has, since somebody saw it die. With `pid`, only if that is its process."""
        worker = self._fleet.by_id.get(worker_id)
        if worker is not None and pid in (None, worker.hello.pid):
            self._lose_and_dispatch(worker, cause, reason)

    # ---- time and shutdown ---------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Act on the passing of time: lost workers, deadlines, models without workers. Call it some ten times/s."""
        now = self._clock()
        heartbeat_s = self._config.liveness.heartbeat_s
        was_deaf = now - self._ticked_at > max(heartbeat_s, 1.0)  # suspended, or a long block: not the workers' fault
        self._ticked_at = now
        for worker in list(self._fleet.by_id.values()):
            if was_deaf:
                worker.forgive(now)
            else:
                self._check(worker, now)
        for request in self._requests.take_late(now):
            where = "while it waited for a worker" if request.state == "queued" else "while it was running"
            self._stop(request, "deadline", deadline_exceeded(request, where))
        for model in self._requests.models.values():
            self._give_up_waiting(model, now)
            self._dispatch(model, now)
        self._requests.measure_rates(now)
        self._billing.tick()

    def drain(self) -> None:
        """Refuse new requests from now on; what is queued or running is finished."""
        self._draining = True

    @property
    def num_unfinished(self) -> int:
        """Requests that have not got their `Finished`: queued and running."""
        return self._requests.num_queued + self._requests.num_running

    # ---- looking in ----------------------------------------------------------------------------------------------

    def statistics(self) -> CoreStatistics:
        """Return every counter and gauge. O(workers + tenants)."""
        requests, workers = self._requests, self._fleet.by_id.values()
        return core_statistics(self._draining, self._totals, requests.models.values(), workers, requests.tenants)

    def check_integrity(self) -> None:
        """Assert that queues, credits, reservations and counts agree. For tests."""
        workers = set(self._fleet.by_id.values())
        assert set(self._fleet.by_peer.values()) == workers
        assert {worker for model in self._requests.models.values() for worker in model.workers} == workers
        self._requests.check_integrity()
        for worker in workers:
            worker.check_integrity()

    # ---- requests ------------------------------------------------------------------------------------------------

    def _dispatch(self, model: Model, now: float) -> None:
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
            if not request.held_for or not self._is_still_held(request, now):
                self._try_to_route(request, model, workers, now)
                if not _have_credits(workers):
                    return

    def _is_still_held(self, request: Request, now: float) -> bool:
        """Return whether `request` waits for a worker that it has chosen lately and that has no room yet."""
        if now - request.held_at >= self._config.queue.reroute_s:
            return False
        worker = self._fleet.by_id.get(request.held_for)
        return worker is not None and worker.state == "ready" and not self._has_room(worker, request)

    def _has_room(self, worker: Worker, request: Request) -> bool:
        """Return whether `worker`, which `request` has chosen, is to have it now."""
        config, tenant_id, key = self._config.queue, request.submit.tenant_id, request.held_key
        if not worker.is_fifo:
            return worker.has_room(tenant_id, key, config.window_s)
        model = self._requests.models[request.submit.model]
        queue, rank = model.queue, request.rank
        if rank and max(model.came_at[:rank]) > self._clock() - config.class_s:
            return worker.has_little(config.window_s / 2)
        if queue.num_active > 1 and queue.lead(tenant_id) > config.window_s * worker.rates.prefill_tokens_per_s:
            return worker.has_little(config.window_s)  # nobody could pass it there
        return worker.has_room(tenant_id, key, config.fifo_window_s)

    def _try_to_route(self, request: Request, model: Model, workers: list[Worker], now: float) -> None:
        """Route `request`, unless its deadline is over."""
        deadline = request.submit.deadline
        if deadline is not None and deadline <= now:
            self._stop(request, "deadline", deadline_exceeded(request, "while it waited for a worker"))
            return
        try:
            self._route(request, model, workers, now)
        except Exception as bug:
            self._fail(request, bug)

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
        lead = 0.0 if request.is_suspect else queue.lead(tenant_id)
        ahead = lead + (request.rank - NORMAL) * CLASS_S * candidates[0].prefill_tokens_per_s
        decision = choose(request.num_tokens, candidates, now, config, ahead)
        worker = self._fleet.by_id[decision.worker_id]
        if not request.is_suspect:
            request.held_at, request.held_key = now, decision.key
            if not self._has_room(worker, request):
                request.held_since = request.held_since or now
                queue.hold(request, decision.worker_id)
                return
            queue.take(request)
        if request.num_delivered and request.submit.sampling.temperature and "resumed_draws" in worker.hello.lacks:
            decision = msgspec.structs.replace(decision, note=_OTHER_DRAWS.format(request.num_delivered))
        request.attempt += 1
        self._send(worker.peer, request.generate(now, ahead))
        self._requests.dispatched(request)
        worker.take(request, decision, now, config.heat_decay_s)
        if request.is_suspect:
            queue.computing(tenant_id)
        queue.charge(tenant_id, worker.in_flight[request.submit.req_id].num_uncached_tokens)
        self._totals.num_dispatches += 1
        if request.attempt == 1:
            model.counters.queue_s.add(now - request.queued_at)
        held_s = now - request.held_since if request.held_since else 0.0
        request.held_since = 0.0
        self.receipts.add(request.submit.req_id, Receipt(decision, now - request.queued_at, held_s, lead))

    def _stop(self, request: Request, reason: str, error: KvasirError | None = None) -> None:
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

    def _fail(self, request: Request, bug: Exception) -> None:
        """Fail the one request whose handling has raised."""
        self.notify(Broken(request.submit.req_id, "".join(traceback.format_exception(bug))))
        self._stop(request, "error", KvasirError("the gateway failed on this request; its log says how"))

    def end_requests(self, payer_id: str, error: KvasirError) -> None:
        """End everything of a tenant or key, by its id, with `error`."""
        for request in self._requests.of_payer(payer_id):
            self._stop(request, "error", error)

    @property
    def queue_config(self) -> QueueConfig:
        """How many requests may wait."""
        return self._config.queue

    # ---- the ledger ----------------------------------------------------------------------------------------------

    def reserved(self, bills: Sequence[Bill], error: KvasirError | None = None) -> None:
        """Go on with the requests of `bills`, whose rows are on disk; or end them with `error`.

        Nothing that a worker says of a request is taken in before its row is written; it is held until then.
        """
        now = self._clock()
        for bill in bills:
            bill.is_written = True
            for req_id in bill.req_ids if error is not None else ():
                request = self._requests.get(req_id)
                if request is not None:
                    self._stop(request, "error", error)
            for worker, output in self._held.pop(bill.bill_id, ()):
                self._outputs(worker, [output], now)
                self._dispatch(self._requests.models[worker.hello.model], now)

    # ---- workers' reports ----------------------------------------------------------------------------------------

    def _step(self, worker: Worker, report: StepReport, now: float) -> None:
        """Take in one engine step: its load, its block events, its outputs. In that order, so that what is sent next
        is chosen with what is known now."""
        worker.stepped(report.step, report.load, now)
        if not worker.index.apply(report.event_seq, report.stored, report.removed, now):
            worker.audit.begin(now)
            self._totals.num_resyncs += 1
            self._send(worker.peer, Resync())
        self._outputs(worker, report.outputs, now)

    def _outputs(self, worker: Worker, outputs: Sequence[Output], now: float) -> None:
        """Take in what a worker has computed, until something is wrong with it: the worker is lost then."""
        for output in outputs:
            attempt = worker.in_flight.get(output.req_id)
            if attempt is None or attempt.request.attempt != output.attempt:
                self._count_stale(worker)
                continue
            bill = attempt.request.share.bill
            if not bill.is_written:
                self._held.setdefault(bill.bill_id, []).append((worker, output))
                continue
            try:
                violation = self._output(worker, attempt, output, now)
            except Exception as bug:
                self._fail(attempt.request, bug)
                continue
            if violation is not None:
                self._lose(worker, "protocol", f"broke the protocol: {violation}", now)
                return

    def _output(self, worker: Worker, attempt: Attempt, output: Output, now: float) -> str | None:
        """Deliver one output; return what is wrong with it, if anything."""
        request = attempt.request
        if output.num_rejected_tokens:  # computed for its tenant, if for nothing
            submit = request.submit
            self._requests.models[submit.model].queue.charge(submit.tenant_id, output.num_rejected_tokens)
        if request.state == "dispatched":
            violation = misfit(request, output)
            if violation is not None:
                return violation
            self._deliver(worker, attempt, output, now)
        elif output.num_cached_tokens is not None:  # cancelled, and only now told
            self._matched(worker, attempt, output.num_cached_tokens)
        if output.finish_reason is None:
            return None
        self._give_back(worker, output.req_id, now)
        if request.state == "closed":  # cancelled: its end has been told, perhaps in answer to the last delta
            self._requests.release(request)
        else:
            self._end_attempt(worker, request, output, now)
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
            self._matched(worker, attempt, output.num_cached_tokens)
            self.savings.add(request.submit, output.num_cached_tokens)
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
        self._stop(request, "length")

    def _end_attempt(self, worker: Worker, request: Request, output: Output, now: float) -> None:
        """Finish a request with its worker's last word, or queue it again if the worker hands it back."""
        if output.finish_reason == "abort":  # not asked for: the worker is about to leave, and wants no more
            worker.state = "draining"
            self._go_on(request, worker, now)
        else:
            end = last_word(request, output, worker.worker_id)
            self._requests.finish(request, end.reason, end.error)

    def _prefilled(self, worker: Worker, attempt: Attempt) -> bool:
        """Note that a prompt is computed or not wanted any more; False: that was known."""
        is_news = worker.prefilled(attempt)
        if is_news:
            submit = attempt.request.submit
            self._requests.models[submit.model].queue.computed(submit.tenant_id)
        return is_news

    def _give_back(self, worker: Worker, req_id: bytes, now: float) -> Request:
        """Take an attempt that is over from its worker. A prompt that was not computed is not charged."""
        attempt = worker.in_flight[req_id]
        submit = attempt.request.submit
        if self._prefilled(worker, attempt):
            self._requests.models[submit.model].queue.charge(submit.tenant_id, -attempt.num_uncached_tokens)
        return worker.give_back(req_id, now)

    def _matched(self, worker: Worker, attempt: Attempt, num_cached_tokens: int) -> None:
        """Take in how many tokens of a prompt were cached, charge what it was charged too little, and say why no more
        were."""
        worker.matched(attempt, num_cached_tokens)
        submit = attempt.request.submit
        queue = self._requests.models[submit.model].queue
        queue.charge(submit.tenant_id, attempt.num_predicted_tokens - num_cached_tokens)
        now = self._clock()
        self._note_miss(worker, attempt, num_cached_tokens, now)
        if worker.audit.is_due(now):
            worker.resync(now)
            self._totals.num_resyncs += 1
            self._send(worker.peer, Resync())

    def _note_miss(self, worker: Worker, attempt: Attempt, num_cached_tokens: int, now: float) -> None:
        """Write into the receipt of an attempt what was found cached, and why no more was."""
        request, submit = attempt.request, attempt.request.submit
        receipts = self.receipts.of(submit.req_id)
        is_worth = is_worth_a_reason(submit)
        if receipts is not None:
            receipt = receipts[-1]
            receipt.num_cached_tokens = num_cached_tokens
            if request.attempt == 1 and is_worth:
                size, decision = self._config.block_size, receipt.decision
                receipt.miss = explain(submit, self._prompts, num_cached_tokens, size, decision, self._index_of, now)
        if is_worth and not submit.no_store:
            self._prompts.add(submit, worker.worker_id)

    def _index_of(self, worker_id: str) -> PrefixIndex | None:
        worker = self._fleet.by_id.get(worker_id)
        return None if worker is None else worker.index

    def _count_stale(self, worker: Worker) -> None:
        worker.counters.num_stale_outputs += 1
        self._totals.num_stale_outputs += 1

    # ---- workers come and go -------------------------------------------------------------------------------------

    def _welcome(self, worker: Worker) -> None:
        config, hello = self._config, worker.hello
        root = config.root(hello.fingerprint, hello.dtype)
        self._send(worker.peer, Welcome(worker.epoch, config.public_namespace, config.liveness.heartbeat_s, root))
        self.kv.greet(worker)

    def _is_alive(self, holder: Worker, peer: bytes, hello: Hello, now: float) -> bool:
        """Return whether another incarnation than that of `hello` has its worker id and seems to be alive."""
        if holder.hello.incarnation == hello.incarnation or holder.peer == peer:
            return False
        return failure(holder, now, self._config.liveness) is None

    def _check(self, worker: Worker, now: float) -> None:
        """Lose `worker` if it is silent or stalled; probe its link when it has been quiet for a heartbeat."""
        liveness = self._config.liveness
        failed = failure(worker, now, liveness)
        if failed is not None:
            self._lose(worker, *failed, now)
        elif now - max(worker.last_report_at, worker.last_probe_at) > liveness.heartbeat_s:
            worker.last_probe_at = now
            self._send(worker.peer, _PROBE)

    def _lose_and_dispatch(self, worker: Worker, cause: Cause, reason: str) -> None:
        now = self._clock()
        self._lose(worker, cause, reason, now)
        self._dispatch(self._requests.models[worker.hello.model], now)

    def _lose(self, worker: Worker, cause: Cause, reason: str, now: float) -> None:
        """Forget `worker` and hand back what it had, in the order in which it was sent. Does not dispatch."""
        if not worker.is_member:
            return
        self._fleet.remove(worker)
        model = self._requests.models[worker.hello.model]
        model.workers.remove(worker)
        model.lost_at = now
        self._totals.num_lost[cause] = self._totals.num_lost.get(cause, 0) + 1
        died_with = [] if cause == "bye" else worker.computing()
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
                self._fail(request, bug)
        self.notify(Lost(worker.worker_id, worker.hello.pid, cause, reason, len(unfinished)))

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

    # ---- time ----------------------------------------------------------------------------------------------------

    def _give_up_waiting(self, model: Model, now: float) -> None:
        """Finish what has waited too long for a model without any worker, or without one that is large enough."""
        timeout_s = self._config.no_worker_timeout_s
        largest = max((worker.max_context for worker in model.workers), default=0)
        waited_s = now - model.lost_at
        if largest >= model.max_context or waited_s < timeout_s:
            return
        for request in [*model.suspects, *model.queue]:
            if request.num_needed > largest and now - request.queued_at >= timeout_s:
                size = f" for {request.num_needed} tokens" if largest else ""
                text = f"model {model.name!r} has had no worker{size} for {waited_s:.0f} s; try again later"
                self._stop(request, "error", Unavailable(text, retry_after_s=timeout_s))


def _have_credits(workers: list[Worker]) -> bool:
    return bool([worker for worker in workers if worker.num_credits > 0])  # half the time of `any`


def _emptied_for_suspect(model: Model) -> Worker | None:
    """Return the worker that gets nothing new until it is empty, because the first suspect is to run alone there."""
    needed = model.suspects[0].num_needed
    able = [w for w in model.workers if w.state == "ready" and not w.runs_suspect and w.max_context >= needed]
    return min(able, key=lambda worker: (len(worker.in_flight), worker.worker_id), default=None)
