"""The product in the routing lab: its own core, engine and caches, in virtual time.

Arrivals are submitted to `Core`. A worker is an `Engine` with a `PrefixCache` (leaf-first LRU), whose model computes
nothing and takes as long as the prefill would. What a step has done is reported when it ends. To the engine an answer
is one token; the lab finishes the request when decoding would be over, which neither takes room in the cache nor slows
anything, as for the peers. The product keeps no partial last block of a prompt, and gets no room for them.

To save the lab's time 16 tokens of a trace are one token for core and engine, where its blocks allow that: under a
thousandth of a second of prefill.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
from replay_cache import PUBLIC, ROOT, SPACE, Trace
from route_arrivals import PREFILL_TOKENS_PER_S, Arrival
from route_peers import DECODE_S, MAX_RUNNING, Served

from kvasir.cache.prefix_cache import PrefixCache
from kvasir.gateway.core.api import Delta, Event, Finished, Submit
from kvasir.gateway.core.billing import Billing
from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.core import Core
from kvasir.gateway.core.worker_checks import LivenessConfig
from kvasir.gateway.routing.router import RouterConfig
from kvasir.protocol import PROTOCOL_VERSION
from kvasir.protocol.messages import Command, Generate, Hello, Limits, Load, Output, Resync, Snapshot, StepReport
from kvasir.protocol.sampling import Sampling
from kvasir.protocol.terms import NO_TERMS, Terms
from kvasir.protocol.tokens import TOKEN_BYTES, pack_tokens
from kvasir.worker.engine.engine import Engine
from kvasir.worker.engine.scheduler import EngineLimits
from kvasir.worker.engine.step import Mask, Sampled, StepBatch, StepResult

MODEL = "lab"
TICK_S = 0.1
MAX_TENANTS = 1_000  # beyond it all have weight 1
UNIT_TOKENS = 16  # tokens of the trace per token of the lab
OWN_AGEING = 0.2  # a worker's default
FIFO_AGEING = 1e6  # a second of waiting outweighs any prompt: first come, first served
_NEVER_S = 1e9
_GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class ProductOptions:
    """`is_fifo`: workers compute first come, first served. `step_tokens` of prompts fit in one step of a worker, which
    takes `step_s` beside the prefill. `delay_s`: one way between gateway and workers. `weights` of tenants, in turn.
    `num_high` of the tenants are of the high class, the others of the low one; 0: all are alike."""

    is_fifo: bool = False
    step_tokens: int = 8192
    step_s: float = 0.0
    delay_s: float = 0.0
    weights: tuple[int, ...] = (1,)
    num_high: int = 0
    router: RouterConfig = field(default_factory=RouterConfig)


def tenant_name(number: int) -> str:
    return f"tenant-{number}"


def run_product(
    trace: Trace, arrivals: Sequence[Arrival], num_workers: int, num_blocks: int, options: ProductOptions
) -> list[Served]:
    """Serve `arrivals` with workers of `num_blocks` blocks each."""
    return _Lab(trace, num_workers, num_blocks, options).run(arrivals)


class _Lab:
    """The core, its workers and the clock: what happens next is the first of a heap."""

    def __init__(self, trace: Trace, num_workers: int, num_blocks: int, options: ProductOptions) -> None:
        self.trace = trace
        self.now = 0.0
        self.unit = UNIT_TOKENS if trace.block_tokens % UNIT_TOKENS == 0 else 1
        self.block_size = trace.block_tokens // self.unit
        self._options = options
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._num_scheduled = 0
        self.sinks: dict[bytes, _Sink] = {}
        self.num_open = 0
        config = CoreConfig(
            PUBLIC,
            self.block_size,
            liveness=LivenessConfig(stall_s=_NEVER_S, max_missed_heartbeats=1 << 30),
            router=options.router,
        )
        weights = options.weights
        num_high = options.num_high
        terms = {
            tenant_name(i): Terms(
                weight=weights[i % len(weights)], priority=("high" if i < num_high else "low") if num_high else None
            )
            for i in range(MAX_TENANTS)
        }
        billing = Billing(lambda payer_id: terms.get(payer_id, NO_TERMS))
        self.core = Core(config, self._send, lambda: self.now, epoch=b"lab", billing=billing)
        num_whole_blocks = max(1, num_blocks * trace.num_whole // trace.num_distinct)
        self._workers = {}
        for i in range(num_workers):
            worker = _LabWorker(self, i, num_whole_blocks, options)
            self._workers[worker.peer] = worker
            self.core.worker_hello(worker.peer, worker.hello)

    def at(self, time_s: float, call: Callable[[], object]) -> None:
        """Have `call` called at `time_s`; of several the one that was asked for first."""
        self._num_scheduled += 1
        heapq.heappush(self._heap, (time_s, self._num_scheduled, call))

    def run(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Submit all `arrivals` and let time pass until everything is answered."""
        self.num_open = len(arrivals)
        for i, arrival in enumerate(arrivals):
            self.at(arrival.time_s, partial(self._submit, b"%d" % i, arrival))
        self.at(0.0, self._tick)
        while self._heap:
            self.now, _, call = heapq.heappop(self._heap)
            call()
        self.core.check_integrity()
        return [self.sinks[b"%d" % i].served for i in range(len(arrivals))]

    def _submit(self, req_id: bytes, arrival: Arrival) -> None:
        sink = self.sinks[req_id] = _Sink(self, arrival)
        request, size = arrival.request, self.block_size
        num_tokens = max(1, request.num_tokens // self.unit)
        if num_tokens + 2 > self.core.models()[MODEL].max_context:
            sink.put(Finished(req_id, "error", 0, 0))  # the edges refuse it
            return
        block_ids = request.block_ids[: num_tokens // size]
        tokens = b"".join([pack_tokens((block_id,)) * size for block_id in block_ids])
        submit = Submit(
            req_id=req_id,
            tenant_id=tenant_name(arrival.tenant),
            model=MODEL,
            token_ids=tokens + bytes(TOKEN_BYTES * num_tokens - len(tokens)),
            num_prompt_tokens=num_tokens,
            root=ROOT,
            prefix_hashes=b"".join(self.trace.chain(request).hashes[: len(block_ids)]),
            num_public_tokens=0,
            namespace=SPACE,
            max_tokens=2,
            sampling=_GREEDY,
            sink=sink,
            arrived=self.now,
        )
        self.core.submit(submit)

    def _send(self, peer: bytes, command: Command) -> None:
        self.at(self.now + self._options.delay_s, partial(self._workers[peer].take, command))

    def _tick(self) -> None:
        self.core.tick()
        if self.num_open:
            self.at(self.now + TICK_S, self._tick)


class _Sink:
    """What one request gets; keeps of it what the lab's rows need."""

    def __init__(self, lab: _Lab, arrival: Arrival) -> None:
        self._lab = lab
        self.arrival = arrival
        self._ttft_s = 0.0
        self._finished: Finished | None = None

    def put(self, event: Event) -> None:
        if isinstance(event, Delta):
            self._ttft_s = self._ttft_s or self._lab.now - self.arrival.time_s
        else:
            self._finished = event
            self._lab.num_open -= 1

    @property
    def served(self) -> Served:
        finished = self._finished
        assert finished is not None, "a request was never answered"
        if finished.reason != "stop":
            return Served(self.arrival, None, 0, 0.0)
        num_hit = min(finished.num_cached_tokens * self._lab.unit, self.arrival.request.num_tokens)
        return Served(self.arrival, int(finished.worker_id), num_hit, self._ttft_s)


class _LabWorker:
    """An engine stepped in virtual time; commands that come during a step wait for its end."""

    def __init__(self, lab: _Lab, number: int, num_blocks: int, options: ProductOptions) -> None:
        self.peer = b"%d" % number
        self._lab = lab
        self._delay_s = options.delay_s
        self._model = _Model(PREFILL_TOKENS_PER_S / lab.unit, options.step_s)
        size, step_tokens = lab.block_size, max(1, options.step_tokens // lab.unit)
        context = num_blocks * size
        ageing = FIFO_AGEING if options.is_fifo else OWN_AGEING
        limits = EngineLimits(MAX_RUNNING, step_tokens, context, max_step_s=_NEVER_S, ageing=ageing)
        model, cache = self._model, PrefixCache(num_blocks, size)
        self._engine = Engine(model, cache, limits, vocab_size=1 << 32, clock=model.clock)
        self.hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            worker_id=str(number),
            incarnation=self.peer,
            model=MODEL,
            fingerprint="lab",
            dtype="none",
            block_size=size,
            num_blocks=num_blocks,
            limits=Limits(MAX_RUNNING, context, step_tokens),
            lacks=["order"] if options.is_fifo else [],
        )
        self._inbox: list[Command] = []
        self._is_busy = False  # a step is running, or about to
        self._num_reports = self._event_seq = 0

    def take(self, command: Command) -> None:
        """Carry out a command of the core: now, or when the step is over."""
        self._inbox.append(command)
        if not self._is_busy:
            self._is_busy = True
            self._lab.at(self._lab.now, self._step)  # with all that comes at this moment

    def _step(self) -> None:
        self._model.now = self._lab.now
        for command in self._inbox:
            if isinstance(command, Generate):
                lead = 0.0 if "order" in self.hello.lacks else command.lead
                self._engine.submit(msgspec.structs.replace(command, max_tokens=1, lead=lead))
            elif isinstance(command, Resync):
                self._report(self._engine.snapshot())
        self._inbox.clear()
        self._is_busy = self._engine.has_work
        if self._is_busy:
            report = self._engine.step()
            self._lab.at(self._model.now, partial(self._end_step, report))

    def _end_step(self, report: StepReport) -> None:
        self._event_seq = report.event_seq
        for output in report.outputs:
            if output.finish_reason == "length":
                output.finish_reason = None
                decode_s = DECODE_S * self._lab.sinks[output.req_id].arrival.request.num_output_tokens
                self._lab.at(self._lab.now + decode_s, partial(self._finish, output.req_id, output.attempt))
        self._report(report)
        self._step()

    def _finish(self, req_id: bytes, attempt: int) -> None:
        self._report(StepReport(0, self._event_seq, Load(), [Output(req_id, attempt, 1, finish_reason="stop")]))

    def _report(self, report: StepReport | Snapshot) -> None:
        if isinstance(report, StepReport):
            self._num_reports += 1
            report.step = self._num_reports
        self._lab.at(self._lab.now + self._delay_s, partial(self._lab.core.worker_report, self.peer, report))


class _Model:
    """An executor that takes time and computes nothing."""

    def __init__(self, tokens_per_s: float, step_s: float) -> None:
        self.now = 0.0
        self._tokens_per_s = tokens_per_s
        self._step_s = step_s

    def clock(self) -> float:
        return self.now

    def launch(self, batch: StepBatch) -> int:
        if batch.slices:
            num_tokens = sum(len(piece.token_ids) for piece in batch.slices)
            self.now += num_tokens / self._tokens_per_s + self._step_s
        return len(batch.rows)

    def collect(self, num_rows: int, masks: Sequence[Mask] = ()) -> StepResult:
        return StepResult([Sampled(0)] * num_rows)
