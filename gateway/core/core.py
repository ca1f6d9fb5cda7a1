"""The core: a state machine from requests and reports to commands and events. No I/O, no tasks, no waiting.

It is called from the tasks of one Trio thread and never awaits, so that every call sees and leaves a consistent
state. Commands leave through `send`, events through each request's sink, news about workers and bugs through `notify`.

    submit -> queued -> dispatched -> closed          one queue per model, by tenant
                 ^---------'  worker lost: attempt + 1, from prompt + delivered tokens

Here are its doors: edges, workers, time. Behind them `Requests` has what is not finished and its queues, `Dispatcher`
says what goes to which worker now, `Attempts` has what workers have in hand, `Fleet` who they are.

Compute is at-least-once; an event reaches a sink exactly once and in order, and every request ends in one `Finished`.
An exception out of the handling of one request is a bug that fails this request, not the process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvasir.gateway.core.admission import Bill
from kvasir.gateway.core.api import Cancel, Change, CoreApi, Finished, ModelInfo, Standing, Submit
from kvasir.gateway.core.attempts import Attempts
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.counters import Totals
from kvasir.gateway.core.dispatcher import Dispatcher
from kvasir.gateway.core.endings import deadline_exceeded
from kvasir.gateway.core.fleet import Fleet
from kvasir.gateway.core.kv_orders import KvOrders
from kvasir.gateway.core.notices import Cause, Joined, Lost, Notice, Rejected
from kvasir.gateway.core.receipts import Receipts
from kvasir.gateway.core.requests import Model, QueueConfig, Requests
from kvasir.gateway.core.savings import Savings
from kvasir.gateway.core.statistics import CoreStatistics, core_statistics
from kvasir.gateway.core.worker import Worker
from kvasir.gateway.core.worker_checks import failure, refusal
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

_DRAINING = Unavailable("the gateway is shutting down; send the request to another one, or again in a minute")
_PROBE = Abort(b"\0", 0)  # nobody's request: workers ignore it, but a dead link cannot take it


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
        self._notify = notify
        self._fleet = Fleet(epoch, config.models)
        self._billing = billing or Billing()
        self._requests = Requests(config.queue, config.models, clock(), self._billing)
        self._totals = Totals()
        self.kv = KvOrders(self._fleet, send)
        self.receipts = Receipts(config.max_explained, config.block_size)
        self.savings = Savings(config.block_size)
        self._attempts = Attempts(
            config,
            send,
            notify,
            fleet=self._fleet,
            requests=self._requests,
            billing=self._billing,
            totals=self._totals,
            receipts=self.receipts,
            savings=self.savings,
        )
        self._dispatcher = Dispatcher(config, self._fleet, self._attempts, self.receipts)
        self._draining = False
        self._ticked_at = clock()

    # ---- edges: see `CoreApi` ------------------------------------------------------------------------------------

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
                self._dispatcher.dispatch(self._requests.models[name], now)

    def cancel(self, cancel: Cancel) -> None:
        """Finish a request with `cancel.reason`; its worker is told. Unknown and finished ids are ignored."""
        request = self._requests.get(cancel.req_id)
        if request is not None:
            request.num_told = cancel.num_output_tokens
            self._attempts.stop(request, cancel.reason)

    def sent(self, req_id: bytes, num_output_tokens: int) -> None:
        self._billing.sent(req_id, num_output_tokens)

    def closed(self, req_id: bytes) -> None:
        self._billing.closed(req_id)

    def models(self) -> dict[str, ModelInfo]:
        """Return what is served or configured, by name. A model that never had a worker has no fingerprint yet."""
        return self._fleet.infos

    def standing(self, tenant_id: str, key_id: str) -> Standing | None:
        return self._billing.standing(tenant_id, key_id, self._clock())

    def change(self, submit: Submit, previous_id: bytes) -> tuple[Change, int] | None:
        return self.receipts.change(submit, previous_id)

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
            self._notify(Rejected(hello, reason))
            return
        for old in (known, holder):
            if old is not None and old.is_member:
                self._lose(old, "replaced", "was replaced by a new session", now)
        worker = self._fleet.admit(peer, hello, now)
        model = self._requests.model(hello.model, now)
        model.workers.append(worker)
        model.max_context = max(model.max_context, worker.max_context)
        self._notify(Joined(hello))
        self._welcome(worker)
        self._dispatcher.dispatch(model, now)

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
        self._dispatcher.dispatch(self._requests.models[worker.hello.model], now)

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
            self._attempts.stop(request, "deadline", deadline_exceeded(request, where))
        for model in self._requests.models.values():
            self._give_up_waiting(model, now)
            self._dispatcher.dispatch(model, now)
        self._requests.measure_rates(now)
        self._requests.sweep()
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

    # ---- administration ------------------------------------------------------------------------------------------

    def end_requests(self, payer_id: str, error: KvasirError) -> None:
        """End everything of a tenant or key, by its id, with `error`."""
        for request in self._requests.of_payer(payer_id):
            self._attempts.stop(request, "error", error)

    def forget(self, payer_id: str) -> None:
        """Drop what is remembered of a tenant or key that is gone, whose requests have been ended."""
        self._billing.admission.forget(payer_id)
        self._requests.forget(payer_id)

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
                    self._attempts.stop(request, "error", error)
            for worker, output in self._attempts.written(bill.bill_id):
                self._outputs(worker, [output], now)
                self._dispatcher.dispatch(self._requests.models[worker.hello.model], now)

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
        violation = self._attempts.outputs(worker, outputs, now)
        if violation is not None:
            self._lose(worker, "protocol", f"broke the protocol: {violation}", now)

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
        self._dispatcher.dispatch(self._requests.models[worker.hello.model], now)

    def _lose(self, worker: Worker, cause: Cause, reason: str, now: float) -> None:
        """Forget `worker` and hand back what it had, in the order in which it was sent. Does not dispatch."""
        if not worker.is_member:
            return
        self._fleet.remove(worker)
        model = self._requests.models[worker.hello.model]
        model.workers.remove(worker)
        model.lost_at = now
        self._totals.num_lost[cause] = self._totals.num_lost.get(cause, 0) + 1
        num_unfinished = self._attempts.take_back(worker, now, is_death=cause != "bye")
        self._notify(Lost(worker.worker_id, worker.hello.pid, cause, reason, num_unfinished))

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
                self._attempts.stop(request, "error", Unavailable(text, retry_after_s=timeout_s))
