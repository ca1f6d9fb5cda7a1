"""What the core knows of one worker: who it is, what it has, how fast it is. Pure state; the core decides."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from kvasir.gateway.core.counters import WorkerCounters
from kvasir.gateway.core.rates import Rates
from kvasir.gateway.core.request import Request
from kvasir.gateway.routing.audit import Audit
from kvasir.gateway.routing.backlog import Backlog, Pending
from kvasir.gateway.routing.foresight import Foresight
from kvasir.gateway.routing.prefix_index import PrefixIndex
from kvasir.gateway.routing.router import Candidate, Decision, RouterConfig
from kvasir.protocol.messages import Drafts, Hello, KvAccounts, Load
from kvasir.protocol.prefix import HASH_BYTES

_NEWEST = 0.1  # weight of the newest request's stay in their mean
MAX_PROPOSERS = 8

WorkerState = Literal["ready", "draining"]


class Attempt(msgspec.Struct, eq=False):
    """One request in flight on a worker.

    Of its prompt `num_predicted_tokens` should be cached there (`num_resident_blocks` were, when it was sent) and
    `num_uncached_tokens`, one at least, not. `pending`: the latter, until they are computed or not wanted any
    more. `is_reserved`: blocks of its prompt count as cached there because of it. `num_generated`: tokens of the
    answer, rejected drafts too, that were not charged yet."""

    request: Request
    dispatched_at: float
    num_predicted_tokens: int
    num_resident_blocks: int
    num_uncached_tokens: int
    pending: Pending | None
    is_reserved: bool = True
    num_generated: int = 0


@dataclass(slots=True, eq=False)
class Worker:
    """One worker in one session, from `Hello` until it leaves or is lost. `epoch` names the session on the wire."""

    peer: bytes
    hello: Hello
    epoch: bytes
    joined_at: float
    rates: Rates
    state: WorkerState = "ready"
    step: int = -1
    last_report_at: float = 0.0  # any report
    last_step_at: float = 0.0  # a report whose step counter had grown, or the work it had to begin with
    last_probe_at: float = 0.0
    load: Load = field(default_factory=Load)
    loaded_at: float = 0.0  # when `load` was reported
    in_flight: dict[bytes, Attempt] = field(default_factory=dict)
    index: PrefixIndex = field(default_factory=PrefixIndex)
    backlog: Backlog = field(default_factory=Backlog)
    kv: KvAccounts = field(default_factory=lambda: KvAccounts([]))  # as last reported
    pins: dict[str, bytes] = field(default_factory=dict)  # what it was told to pin: name -> hash of the last block
    counters: WorkerCounters = field(default_factory=WorkerCounters)
    drafts: dict[str, Drafts] = field(default_factory=dict)  # by proposer
    max_context: int = field(init=False)  # longest prompt + answer: the model's window, or all of the KV pool if less
    runs_suspect: bool = False  # it has a suspect, which is alone there
    is_member: bool = True  # False once it is lost: nothing may be booked on it any more
    challenger: bytes = b""  # a peer that wants this worker's id; a probe was sent to see which of them is alive
    foresight: Foresight | None = field(init=False)  # where `is_fifo`; others hold what waits for them
    audit: Audit = field(init=False)
    _mean_stay_s: float = 1.0  # of a request
    _heat_s: float = 0.0
    _heat_at: float = 0.0

    def __post_init__(self) -> None:
        hello = self.hello
        self.max_context = min(hello.limits.max_context, hello.num_blocks * hello.block_size)
        self.foresight = Foresight(hello.num_blocks) if "order" in hello.lacks else None
        self.audit = Audit(hello.block_size, hello.hit_blocks, self.joined_at)

    @property
    def worker_id(self) -> str:
        return self.hello.worker_id

    @property
    def is_fifo(self) -> bool:
        """Whether it computes prompts in the order in which they come."""
        return self.foresight is not None

    @property
    def num_credits(self) -> int:
        """How many requests it may be sent now: none beside a suspect."""
        if self.state != "ready" or self.runs_suspect:
            return 0
        return self.hello.limits.max_requests - len(self.in_flight)

    @property
    def turnover_per_s(self) -> float:
        """How many requests a second it is done with when it is full, by how long the last ones have stayed."""
        return self.hello.limits.max_requests / max(self._mean_stay_s, 1e-3)

    def heat_s(self, now: float, decay_s: float) -> float:
        """Return the seconds of prefill that were lately sent here, decayed with time constant `decay_s`."""
        return self._heat_s * math.exp((self._heat_at - now) / decay_s) if self._heat_s else 0.0

    def has_room(self, tenant_id: str, key: float, window_s: float) -> bool:
        """Return whether to send a request of that tenant with that place in the backlog now: there is a credit, and
        what the tenant has before that place takes less than `window_s`."""
        if self.num_credits <= 0:
            return False
        return self.backlog.ahead_of_own(key, tenant_id) < window_s * self.rates.prefill_tokens_per_s

    def has_little(self, window_s: float) -> bool:
        """Return whether there is a credit, and all that is to be computed takes less than `window_s`."""
        return self.num_credits > 0 and self.backlog.num_tokens < window_s * self.rates.prefill_tokens_per_s

    def candidate(self, request: Request, now: float, config: RouterConfig, num_before: float = 0.0) -> Candidate:
        """Return this worker as the router sees it for `request`; `num_before` others wait for a credit here."""
        hello = self.hello
        prefix_hashes = request.prefix_hashes
        # At least one prompt token is always computed: its logits are what the first token is drawn from.
        resident, cached = self.index.match(prefix_hashes, (request.num_tokens - 1) // hello.block_size)
        if self.foresight is not None:
            num_coming = self.backlog.num_tokens // hello.block_size
            cached = self.foresight.num_left(prefix_hashes, cached, self.index, num_coming)
            resident = min(resident, cached)
        if hello.hit_blocks > 1:
            resident, cached = resident - resident % hello.hit_blocks, cached - cached % hello.hit_blocks
        in_flight, backlog, max_requests = len(self.in_flight), self.backlog, hello.limits.max_requests
        return Candidate(
            hello.worker_id,
            cached * hello.block_size,
            resident,
            self.rates.prefill_tokens_per_s,
            self.rates.round_s if in_flight > len(backlog) else 0.0,
            hello.limits.max_step_tokens,
            in_flight,
            self.heat_s(now, config.heat_decay_s),
            backlog,
            backlog.leader(prefix_hashes, cached) if cached > resident else None,
            (1 + num_before) * self._mean_stay_s / max_requests if in_flight >= max_requests else 0.0,
            self.is_fifo,
            not self.index.in_sync,
        )

    def take(self, request: Request, decision: Decision, now: float, heat_decay_s: float) -> None:
        """Book `request`, just sent here: a credit, a place in the backlog, its blocks to come, heat."""
        chosen = decision.chosen
        request.worker_id, request.is_held = chosen.worker_id, True
        self.runs_suspect = request.is_suspect
        if not self.in_flight:
            self.last_step_at = now  # an idle engine owes no steps: the stall timer starts with the work
        num_uncached = max(1, decision.num_tokens - chosen.num_cached_tokens)
        prefix_hashes, tenant_id = request.prefix_hashes, request.submit.tenant_id
        pending = self.backlog.add(decision.key, num_uncached, prefix_hashes, tenant_id, decision.lead_s)
        # Everything that is not resident, also what others have reserved: they may be gone before this one.
        attempt = Attempt(request, now, chosen.num_cached_tokens, decision.num_resident_blocks, num_uncached, pending)
        attempt.is_reserved = not request.submit.no_store
        if attempt.is_reserved:
            self.index.reserve(request.prefix_hashes, decision.num_resident_blocks)
            if self.foresight is not None:
                self.foresight.use(prefix_hashes)
        self.in_flight[request.submit.req_id] = attempt
        self._heat_s = self.heat_s(now, heat_decay_s) + chosen.miss_s
        self._heat_at = now
        self.counters.num_requests += 1

    def computing(self) -> list[Request]:
        """Return what the engine may be working on: requests whose prompt is computed, and the prompts of a step."""
        front = self.backlog.next_step(self.hello.limits.max_step_tokens)
        return [a.request for a in self.in_flight.values() if a.pending is None or a.pending in front]

    def stepped(self, step: int, load: Load, now: float) -> None:
        """Take in what a step report says of the engine."""
        self.load = load
        self.loaded_at = now
        if step > self.step:
            self.step = step
            self.last_step_at = now
        self.rates.learn(load)
        if load.num_prefill_tokens:
            self.backlog.advance(load.num_prefill_tokens)
        for new in load.drafts:
            if new.proposer not in self.drafts and len(self.drafts) >= MAX_PROPOSERS:
                continue
            old = self.drafts.get(new.proposer, Drafts(new.proposer, 0, 0, 0))
            counts = (old.num_runs + new.num_runs, old.num_drafted + new.num_drafted)
            self.drafts[new.proposer] = Drafts(new.proposer, *counts, old.num_accepted + new.num_accepted)

    def forgive(self, now: float) -> None:
        """Start all timers anew: nobody was listening."""
        self.last_report_at = self.last_step_at = now

    def matched(self, attempt: Attempt, num_cached_tokens: int) -> None:
        """Take in how many tokens the worker has found in its cache for a request, beside what was predicted."""
        request, counters = attempt.request, self.counters
        request.found_cached(num_cached_tokens)
        counters.prompt_tokens += request.num_tokens
        counters.cached_tokens += num_cached_tokens
        counters.predicted_cached_tokens += attempt.num_predicted_tokens
        counters.mispredicted_tokens += abs(num_cached_tokens - attempt.num_predicted_tokens)
        if self.index.in_sync:
            counters.drift_tokens += self.audit.check(
                self.index,
                request.prefix_hashes,
                attempt.num_resident_blocks,
                num_cached_tokens // self.hello.block_size,
                attempt.dispatched_at,
                request.num_tokens,
            )

    def resync(self, now: float) -> None:
        """Believe nothing of its cache until the snapshot comes that it is about to be asked for."""
        self.index.distrust()
        self.audit.begin(now)

    def prefilled(self, attempt: Attempt) -> bool:
        """Note that a prompt is computed (its first token is there) or not wanted any more; False: that was known."""
        is_news = attempt.pending is not None
        if attempt.pending is not None:
            attempt.request.is_begun |= attempt.pending.is_begun
            self.backlog.remove(attempt.pending)
            attempt.pending = None
        if attempt.is_reserved:
            self.index.release(attempt.request.prefix_hashes, attempt.num_resident_blocks)
            attempt.is_reserved = False
        return is_news

    def give_back(self, req_id: bytes, now: float) -> Request:
        """Undo `take`, after `prefilled`: the credit is free again. Return the request."""
        attempt = self.in_flight.pop(req_id)
        assert attempt.pending is None, "a prompt is still expected to be computed"
        attempt.request.is_held = self.runs_suspect = False
        self._mean_stay_s += _NEWEST * (now - attempt.dispatched_at - self._mean_stay_s)
        return attempt.request

    def check_integrity(self) -> None:
        """Assert that credits, backlog and reservations follow from what is in flight."""
        attempts = list(self.in_flight.values())
        assert len(attempts) <= self.hello.limits.max_requests, "more requests in flight than credits"
        assert len(attempts) <= 1 or not any(a.request.is_suspect for a in attempts), "a suspect is not alone"
        assert self.runs_suspect == any(a.request.is_suspect for a in attempts)
        pending = [attempt.pending for attempt in attempts if attempt.pending is not None]
        assert len(pending) == len(self.backlog), "the backlog holds other requests than those in flight"
        assert self.backlog.num_tokens == sum(entry.num_tokens for entry in pending)
        reserved = [a for a in attempts if a.is_reserved]
        num_reserved = sum(len(a.request.prefix_hashes) // HASH_BYTES - a.num_resident_blocks for a in reserved)
        assert self.index.statistics().num_reserved == num_reserved, "reservations leak"
        for attempt in attempts:
            request = attempt.request
            assert request.is_held and request.worker_id == self.worker_id, (
                "a request in flight believes itself elsewhere"
            )
            assert request.state in ("dispatched", "closed")
