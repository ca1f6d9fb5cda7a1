"""The core among simulated workers, links and clients, on a virtual clock. Same seed, same trace.

A simulated worker speaks the worker protocol: credits, a prefix cache with eviction, steps with a token budget, block
events, heartbeats. Its model returns token i = H(all tokens before i), so that one lost, doubled or reordered token
changes everything after it: comparing a stream with the oracle is a complete check. Workers are killed, stalled (they
come back as zombies), drained and restarted; events are skipped; clients cancel and set deadlines.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from xxhash import xxh3_64_intdigest

from kvasir.gateway.core.api import Cancel
from kvasir.gateway.core.config import CoreConfig
from kvasir.gateway.core.core import Core
from kvasir.gateway.core.notices import Broken, Lost, Notice
from kvasir.gateway.core.worker_checks import LivenessConfig
from kvasir.protocol.messages import (
    Abort,
    Bye,
    Command,
    Drain,
    Generate,
    Identify,
    Load,
    Output,
    Refused,
    Resync,
    Snapshot,
    StepReport,
    Welcome,
)
from kvasir.protocol.prefix import extend_chain, split_hashes
from kvasir.protocol.tokens import pack_tokens, unpack_tokens
from tests.core_helpers import BLOCK_SIZE, PUBLIC, RecordingSink, make_hello, make_submit

EOS = 7
LIVENESS = LivenessConfig(heartbeat_s=0.1, max_missed_heartbeats=4, stall_s=0.5)


def next_token(tokens: list[int]) -> int:
    """The oracle model: one of 50 tokens, decided by all before it. `EOS` is one of them."""
    return xxh3_64_intdigest(pack_tokens(tokens)) % 50


def oracle(prompt: list[int], max_tokens: int, stop: tuple[int, ...], ignore_eos: bool) -> tuple[list[int], str]:
    """Return (answer, finish reason) of an unfaulted run."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop or (tokens[-1] == EOS and not ignore_eos):
            return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"


@dataclass
class Sequence:
    """One request on a simulated worker."""

    generate: Generate
    tokens: list[int]
    num_start: int
    num_computed: int
    num_cached: int
    hashes: list[bytes]
    is_aborted: bool = False
    num_sent: int = 0

    @property
    def num_missing(self) -> int:
        return len(self.tokens) - self.num_computed


@dataclass
class SimulatedWorker:
    """One incarnation of a worker process."""

    simulation: Simulation
    worker_id: str
    incarnation: bytes
    max_requests: int
    num_blocks: int
    step_s: float
    state: str = "joining"  # joining, serving, draining, dead
    stalled_until: float = 0.0
    epoch: bytes = b""
    step: int = 0
    event_seq: int = 0
    sequences: dict[bytes, Sequence] = field(default_factory=dict)
    is_fifo: bool = False
    resident: dict[bytes, None] = field(default_factory=dict)  # least recently used first; parents before children
    stored: dict[bytes, None] = field(default_factory=dict)
    removed: dict[bytes, None] = field(default_factory=dict)

    @property
    def peer(self) -> bytes:
        return self.incarnation

    def say_hello(self) -> None:
        hello = make_hello(
            self.worker_id,
            self.incarnation,
            max_requests=self.max_requests,
            num_blocks=10_000,
            pid=len(self.peer),
            lacks=["order"] if self.is_fifo else [],
        )
        self.simulation.deliver_report(self, hello)

    def command(self, command: Command) -> None:
        match command:
            case Welcome():
                if command.gateway_epoch != self.epoch:
                    self.sequences.clear()
                    self.epoch = command.gateway_epoch
                if self.state == "joining":
                    self.state = "serving"
            case Refused():
                self.simulation.num_refused += 1
                self.state = "dead"
            case Identify():
                self.say_hello()
            case Generate():
                assert len(self.sequences) < self.max_requests, "the gateway sent more than its credits"
                self.sequences[command.req_id] = self._start(command)
            case Abort():
                sequence = self.sequences.get(command.req_id)
                if sequence is not None and sequence.generate.attempt == command.attempt:
                    sequence.is_aborted = True
            case Resync():
                self.simulation.deliver_report(self, Snapshot(self.event_seq, b"".join(self.resident)))
            case Drain():
                self.state = "draining"

    def _start(self, generate: Generate) -> Sequence:
        tokens = unpack_tokens(generate.token_ids)
        hashes = split_hashes(generate.prefix_hashes)
        assert generate.prefix_hashes == extend_chain(
            generate.root, generate.namespace, generate.token_ids, BLOCK_SIZE
        ), "the hashes of a continued request are not those of its tokens"
        num_cached = 0
        for digest in hashes[: (len(tokens) - 1) // BLOCK_SIZE]:
            if digest not in self.resident:
                break
            num_cached += 1
        for digest in reversed(hashes[:num_cached]):  # used now; children before parents, so that parents stay longer
            self.resident[digest] = self.resident.pop(digest)
        return Sequence(generate, tokens, len(tokens), num_cached * BLOCK_SIZE, num_cached * BLOCK_SIZE, hashes)

    def run_step(self) -> None:
        """One engine step: a budget of prefill tokens, shortest first, and one token for everything that is ready."""
        budget, num_decode, outputs = 64, 0, []
        num_prefill = 0
        for req_id, sequence in sorted(
            self.sequences.items(), key=lambda item: 0 if self.is_fifo else len(item[1].tokens) - item[1].num_computed
        ):
            generate = sequence.generate
            if sequence.is_aborted:
                outputs.append(self._output(sequence, [], "abort"))
                del self.sequences[req_id]
                continue
            missing = sequence.num_missing
            if missing > budget and missing > 1:
                sequence.num_computed += budget
                num_prefill, budget = num_prefill + budget, 0
                continue
            if missing > 1 or len(sequence.tokens) == sequence.num_start:
                num_prefill, budget = num_prefill + missing, budget - missing
            else:
                num_decode += 1
            sequence.num_computed = len(sequence.tokens)
            self._publish(sequence)
            token = next_token(sequence.tokens)
            sequence.tokens.append(token)
            reason = None
            if token in generate.stop_token_ids or (token == EOS and not generate.ignore_eos):
                reason = "stop"
            elif len(sequence.tokens) - sequence.num_start == generate.max_tokens:
                reason = "length"
            outputs.append(self._output(sequence, [token], reason))
            if reason is not None:
                del self.sequences[req_id]
        self._evict()
        load = Load(len(self.sequences), 0, 1_000, num_prefill, num_decode, self.step_s)
        stored, removed = b"".join(self.stored), b"".join(self.removed)
        self.stored.clear()
        self.removed.clear()
        self.step += 1
        self.event_seq += bool(stored or removed)
        self.simulation.deliver_report(self, StepReport(self.step, self.event_seq, load, outputs, stored, removed))
        if self.state == "draining" and not self.sequences:
            self.simulation.deliver_report(self, Bye("drained"))
            self.simulation.leave(self)

    def _output(self, sequence: Sequence, tokens: list[int], reason: Any) -> Output:
        generate = sequence.generate
        before = generate.num_prompt_tokens
        seq = sequence.num_start - before + sequence.num_sent
        cached = sequence.num_cached if sequence.num_sent == 0 and tokens else None
        sequence.num_sent += len(tokens)
        return Output(generate.req_id, generate.attempt, seq, pack_tokens(tokens), reason, cached)

    def _publish(self, sequence: Sequence) -> None:
        generate = sequence.generate
        num_hashed = len(sequence.hashes) * BLOCK_SIZE
        parent = sequence.hashes[-1] if sequence.hashes else generate.root
        new = pack_tokens(sequence.tokens[num_hashed : sequence.num_computed])
        sequence.hashes += split_hashes(extend_chain(parent, generate.namespace, new, BLOCK_SIZE))
        for digest in sequence.hashes[: sequence.num_computed // BLOCK_SIZE]:
            if digest not in self.resident:
                self.resident[digest] = None
                if digest in self.removed:
                    del self.removed[digest]
                else:
                    self.stored[digest] = None

    def _evict(self) -> None:
        """Drop the least recently stored ones above the capacity. Not leaf first: an index must survive that too."""
        while len(self.resident) > self.num_blocks:
            digest = next(iter(self.resident))
            del self.resident[digest]
            if digest in self.stored:
                del self.stored[digest]
            else:
                self.removed[digest] = None


@dataclass
class Client:
    """One request and what it must get."""

    sink: RecordingSink
    expected: list[int]
    reason: str
    may_be_cut: bool


class Simulation:
    """Everything around one core. `run()` plays the whole story and checks it."""

    def __init__(self, seed: int, *, num_requests: int = 30, num_workers: int = 3, num_faults: int = 6) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.num_refused = 0
        self.num_losses = 0
        self.num_garbage = 0
        self.trace = hashlib.blake2b(digest_size=16)
        self.clients: dict[bytes, Client] = {}
        self.workers: dict[bytes, SimulatedWorker] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._last_delivery: dict[tuple[bytes, str], float] = {}
        self._num_incarnations = 0
        config = CoreConfig(PUBLIC, BLOCK_SIZE, frozenset({"demo"}), liveness=LIVENESS, no_worker_timeout_s=20.0)
        self.core = Core(config, self._send, lambda: self.now, epoch=b"gateway", notify=self._notice)
        self._pools = [[self.rng.randrange(50) for _ in range(80)] for _ in range(3)]
        for i in range(num_workers):
            self.at(self.rng.random() * 0.2, lambda i=i: self._start_worker(f"w{i}"))
        for i in range(num_requests):
            self.at(self.rng.random() * 2.0, lambda i=i: self._submit(b"r%d" % i))
        for _ in range(num_faults):
            self.at(self.rng.random() * 2.5, self._fault)
        self._tick()

    def run(self) -> str:
        """Play until everything is finished, check, and return the trace's digest."""
        num_events = 0
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()
            num_events += 1
            if num_events % 16 == 0:
                self.core.check_integrity()
            if self.now > 4.0 and self._is_settled():
                break
            assert self.now < 120.0, f"not settled: {self.core.statistics()}"
        self._check()
        return self.trace.hexdigest()

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do `action` after `delay_s`; equal times in the order of the calls."""
        self._serial += 1
        heapq.heappush(self._events, (self.now + delay_s, self._serial, action))

    # ---- links -------------------------------------------------------------------------------------------------------

    def _send(self, peer: bytes, command: Command) -> None:
        worker = self.workers.get(peer)
        if worker is None or worker.state == "dead":
            self.at(0.0, lambda: self.core.worker_unreachable(peer))
        else:
            self._in_order(peer, "command", lambda: self._run_command(worker, command))

    def _run_command(self, worker: SimulatedWorker, command: Command) -> None:
        if worker.state == "dead":
            return
        if worker.stalled_until > self.now:  # it lies in the socket until the process goes on
            self.at(worker.stalled_until - self.now, lambda: self._run_command(worker, command))
            return
        worker.command(command)

    def deliver_report(self, worker: SimulatedWorker, report: Any) -> None:
        """Bring a report to the core, after those sent before it. What is under way survives its sender."""

        def arrive() -> None:
            self._note("report", worker.peer, type(report).__name__)
            if type(report).__name__ == "Hello":
                self.core.worker_hello(worker.peer, report)
            else:
                self.core.worker_report(worker.peer, report)

        self._in_order(worker.peer, "report", arrive)

    def _in_order(self, peer: bytes, way: str, action: Callable[[], None]) -> None:
        due = max(self._last_delivery.get((peer, way), 0.0), self.now + self.rng.random() * 0.004)
        self._last_delivery[peer, way] = due
        self.at(due - self.now, action)

    # ---- workers -----------------------------------------------------------------------------------------------------

    def _start_worker(self, worker_id: str) -> None:
        self._num_incarnations += 1
        rng = self.rng
        incarnation = b"%d" % self._num_incarnations
        worker = SimulatedWorker(
            self, worker_id, incarnation, rng.randrange(1, 6), rng.randrange(10, 200), rng.choice([0.002, 0.005, 0.02])
        )
        worker.is_fifo = rng.random() < 0.3
        self.workers[worker.peer] = worker
        worker.say_hello()
        self._loop(worker, 0.0)

    def _loop(self, worker: SimulatedWorker, reported_at: float) -> None:
        """The worker's main loop: a step while there is work, else a heartbeat now and then."""
        if worker.state == "dead":
            return
        if worker.stalled_until > self.now:
            self.at(worker.stalled_until - self.now, lambda: self._loop(worker, reported_at))
            return
        is_due = worker.sequences or worker.state == "draining" or self.now - reported_at >= LIVENESS.heartbeat_s
        if worker.state != "joining" and is_due:
            worker.run_step()
            reported_at = self.now
        self.at(worker.step_s, lambda: self._loop(worker, reported_at))

    def leave(self, worker: SimulatedWorker) -> None:
        """The process exits; its supervisor starts another after a while."""
        worker.state = "dead"
        self.at(0.05 + self.rng.random() * 0.3, lambda: self._start_worker(worker.worker_id))

    def _kill(self, worker: SimulatedWorker) -> None:
        if worker.state == "dead":
            return
        self._note("kill", worker.peer)
        self.leave(worker)
        if self.rng.random() < 0.5:  # a local worker: its parent sees it exit. A remote one's link tells.
            self.at(0.001, lambda: self.core.worker_lost(worker.worker_id, "exited", pid=len(worker.peer)))

    def _notice(self, notice: Notice) -> None:
        self._note("notice", repr(type(notice)).encode(), getattr(notice, "cause", ""))
        assert not isinstance(notice, Broken), notice
        if isinstance(notice, Lost):
            self.num_losses += 1
            if notice.cause in ("stalled", "silent") and self.rng.random() < 0.5:
                for worker in list(self.workers.values()):
                    if worker.worker_id == notice.worker_id:
                        self._kill(worker)

    def _fault(self) -> None:
        alive = [worker for worker in self.workers.values() if worker.state == "serving"]
        if not alive:
            return
        worker = self.rng.choice(alive)
        kind = self.rng.choice(["kill", "kill", "stall", "skip", "drain", "garbage"])
        self._note("fault", worker.peer, kind)
        if kind == "kill":
            self._kill(worker)
        elif kind == "stall":
            worker.stalled_until = self.now + self.rng.random() * 1.5
        elif kind == "skip":
            worker.event_seq += 1  # as if a report with events had been lost
        elif kind == "drain":
            worker.state = "draining"  # as on SIGTERM
        else:
            self.num_garbage += 1
            self.core.worker_violation(worker.peer, "sent garbage")

    # ---- clients -----------------------------------------------------------------------------------------------------

    def _submit(self, req_id: bytes) -> None:
        rng = self.rng
        prompt = rng.choice(self._pools)[: rng.randrange(1, 80)] + [rng.randrange(50) for _ in range(rng.randrange(12))]
        max_tokens = rng.randrange(1, 40)
        stop = (rng.randrange(50),) if rng.random() < 0.2 else ()
        ignore_eos = rng.random() < 0.5
        deadline = self.now + rng.random() * 2.0 if rng.random() < 0.1 else None
        submit, sink = make_submit(
            req_id,
            prompt,
            tenant=rng.choice("abc"),
            max_tokens=max_tokens,
            arrived=self.now,
            stop_token_ids=stop,
            ignore_eos=ignore_eos,
            deadline=deadline,
            priority=rng.choice((None, None, "low")),
        )
        expected, reason = oracle(prompt, max_tokens, stop, ignore_eos)
        is_cancelled = rng.random() < 0.1
        self.clients[req_id] = Client(sink, expected, reason, is_cancelled or deadline is not None)
        self.core.submit(submit)
        if is_cancelled:
            self.at(rng.random() * 0.4, lambda: self.core.cancel(Cancel(req_id)))

    def _tick(self) -> None:
        self.core.tick()
        self.at(0.05, self._tick)

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _note(self, kind: str, who: bytes, what: str = "") -> None:
        self.trace.update(b"%r %s %s %s;" % (self.now, kind.encode(), who, what.encode()))

    def _is_settled(self) -> bool:
        statistics = self.core.statistics()
        return (
            all(client.sink.finished for client in self.clients.values())
            and all(not worker.num_in_flight for worker in statistics.workers)
            and all(worker.stalled_until <= self.now for worker in self.workers.values())
        )

    def _check(self) -> None:
        self.core.check_integrity()
        assert self.core.num_unfinished == 0
        for req_id, client in self.clients.items():
            finished, tokens = client.sink.finished, client.sink.tokens
            assert finished is not None, f"{req_id!r} was never answered"
            assert finished.num_output_tokens == len(tokens)
            assert tokens == client.expected[: len(tokens)], f"{req_id!r} got other tokens than the oracle's"
            if finished.reason in ("stop", "length"):
                assert (tokens, finished.reason) == (client.expected, client.reason)
            elif finished.reason == "error":
                assert finished.error is not None
                assert finished.error.code in ("request_failed", "unavailable"), finished
            else:
                assert client.may_be_cut, finished
            self._note("client", req_id, f"{finished.reason} {tokens}")
        assert self.core.statistics().totals.num_lost.get("protocol", 0) <= self.num_garbage, (
            "workers were asked for nonsense"
        )
        for worker in self.core.statistics().workers:
            assert (worker.num_in_flight, worker.num_reserved_blocks) == (0, 0)
